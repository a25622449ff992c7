"""What is saved of a figure, and what that takes."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from longtail_experts.learning.statistics import within_interval
from longtail_experts.tracking import figures, study_figures


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


def test_a_class_without_test_images_has_no_part_in_a_mean(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, path: drawn.append(figure))
    recall, is_head = np.array([0.6, 0.4, np.nan, 0.2, np.nan]), np.array([1, 1, 1, 0, 0], bool)
    counts = np.array([100, 50, 30, 10, 5])
    figures.per_class_accuracy(recall, counts, is_head, tmp_path / "figure.png")
    figures.per_class_accuracy(recall[[0, 4]], counts[[0, 4]], is_head[[0, 4]], tmp_path / "x.png")
    told = [[text.get_text() for text in figure.legends[0].get_texts()] for figure in drawn]
    assert told == [
        ["head: 2 classes, mean 50.0 %", "tail: 1 classes, mean 20.0 %"],
        ["head: 1 classes, mean 60.0 %"],
    ]


def test_how_many_trainings_are_behind_each_interval_is_told_where_it_changes(
    tmp_path, monkeypatch
):
    drawn = []
    monkeypatch.setattr(study_figures, "save", lambda figure, path: drawn.append(figure))

    def panel(*sizes: int) -> study_figures.Panel:
        values = [[float(i) for i in range(size)] for size in sizes]
        kinds = [{"noise": within_interval([v]) if v else None} for v in values]
        return study_figures.Panel("", "head", list(zip(values, kinds, strict=True)))

    panels = [panel(2, 5), panel(2, 5), panel(0, 2), panel(2, 5)]
    study_figures.intervals(["ce", "la"], panels, ["noise"], "", tmp_path / "intervals.png")
    told = [[t.get_text() for t in axes.get_yticklabels()] for axes in drawn[0].axes[:4]]
    assert told == [
        ["ce\nn = 2", "la\nn = 5"],
        ["", ""],
        ["", "n = 2"],
        ["ce\nn = 2", "la\nn = 5"],
    ]


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


@pytest.mark.parametrize("title", ["tau $\\foo$ grid", "lr $10^{-$ try", "costs $5 and $6_"])
def test_what_people_call_a_sweep_is_no_mathematics(tmp_path, drawn_figures, title):
    panel = study_figures.Panel("", "head", [([0.1], {"noise": None})])
    study_figures.intervals(["ce"], [panel], ["noise"], title, tmp_path / "intervals.png")
    assert (tmp_path / "intervals.png").stat().st_size > 1000
