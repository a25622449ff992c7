"""What is saved of a figure, and what that takes."""

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
