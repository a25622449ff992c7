"""What is saved of a figure, and what that takes."""

import pytest
from matplotlib.figure import Figure

from longtail_experts.tracking import figures


def test_a_picture_is_that_of_savefig_drawn_once(tmp_path, monkeypatch, drawn_figures):
    draw, drawn = Figure.draw, []
    monkeypatch.setattr(Figure, "draw", lambda *given: (drawn.append(1), draw(*given)))

    def picture(name: str, save) -> bytes:
        figure, axes = figures.new_axes(2, 6.4, 2.5, font_size=8)
        axes[0].plot([1, 3, 2], label="three points")
        axes[1].set(yscale="log", ylabel="nats", title="With room for words")
        axes[0].legend()
        save(figure, tmp_path / name, dpi=100)
        return (tmp_path / name).read_bytes()

    ours = picture("ours.png", figures.save)
    assert len(drawn) == 1
    assert ours == picture("theirs.png", lambda figure, path, dpi: figure.savefig(path, dpi=dpi))


@pytest.mark.parametrize("epochs", [1, 3])
def test_the_training_loss_of_a_single_epoch_can_be_seen(epochs, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, path, dpi: drawn.append(figure))
    losses = [(68 * (epoch + 1), 4.0 / (epoch + 1)) for epoch in range(epochs)]
    histories = {"lr": [(0, 0.4)], "train/loss": losses}
    figures.learning_curves(histories, {}, None, tmp_path / "learning_curves.png")
    (line,) = drawn[0].axes[1].lines
    assert list(zip(*line.get_data(), strict=True)) == losses
    assert (line.get_marker() == "o") == (epochs == 1)
