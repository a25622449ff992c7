"""docs/results.md from a store: what it says of each sweep, and what it never says."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from fake_trials import add_sweep, add_trial
from mlflow import MlflowClient
from PIL import Image
from scipy import stats

from longtail_experts.cli import main
from longtail_experts.config import MLFLOW_RUN, load_config
from longtail_experts.tracking.published import PUBLISHED

LITERATURE = {"protocol": "literature", "subset_rule": "ldam"}
SIZES = {"train": {"size": 8677}, "test_balanced": {"size": 8928}}
MANIFEST = {"pool_counts": [10_000, 847], "splits": SIZES}
GRID = (
    "config: /home/me/own.yaml\n"
    "grid: {loss: [ce, logit_adjust], seed: [0], data_dir: [/home/me/y, /home/me/z z, none]}\n"
    "fixed: {data_dir: /home/me/x y, epochs: 64}"
)


def figures(balanced: float, ece: float = 0.03) -> dict[str, float]:
    return {
        "test_balanced/balanced_accuracy": balanced,
        "test_balanced/head_accuracy": balanced + 0.1,
        "test_balanced/tail_accuracy": balanced - 0.2,
        "test_balanced/ece_uncalibrated": 0.33,
        "test_balanced/ece": ece,
        "temperature": 2.4,
    }


VALUES = {
    "ce": [0.350, 0.352, 0.357],
    "logit_adjust": [0.390, 0.386, 0.391],
}


@pytest.fixture
def short(store) -> str:
    """Two losses, three seeds, 64 epochs of the experts protocol."""
    sweep = add_sweep(store, grid=GRID)
    for loss, values in VALUES.items():
        for seed, value in enumerate(values):
            add_trial(
                store,
                sweep,
                figures(value) | {"test_lt/balanced_accuracy": 0.5},
                loss=loss,
                seed=seed,
                epochs=64,
                milestones="24,48",
                data_dir="/home/me/x",
                manifest=MANIFEST,
            )
    return sweep


def results(*sweeps: str, out: str = "docs/results.md") -> str:
    assert main(["results", "--sweeps", ",".join(sweeps), "--out", out]) == 0
    return Path(out).read_text()


def test_the_page_holds_means_intervals_n_and_differences(short):
    text = results(short)
    for loss, values in VALUES.items():
        half = 100 * stats.t.ppf(0.975, 2) * stats.sem(values)
        assert f"| {loss} | 3 | {100 * np.mean(values):.2f} ± {half:.2f} |" in text
    gains = np.subtract(VALUES["logit_adjust"], VALUES["ce"])
    half = 100 * stats.t.ppf(0.975, 2) * stats.sem(gains)
    assert f"| logit_adjust | 3 | **+{100 * gains.mean():.2f} ± {half:.2f}** |" in text
    assert "| ce | 3 | 2.400 ± 0.000 | 33.00 ± 0.00 | 3.00 ± 0.00 |" in text
    assert "training noise only" in text
    assert "seeds 0, 1, 2; split_seed 42" in text
    assert "test_lt" not in text


def test_a_short_schedule_and_an_own_subset_are_labelled(short):
    text = results(short)
    assert "short schedule (64 of 256 epochs)" in text.split("## ")[1]
    assert "**Short schedule:** 64 of 256 epochs" in text
    assert "**own subset**" in text
    assert "10,847 images in the pool, 8,677 trained on, 8,928 in `test_balanced`." in text


EPOCH_OF_THEIRS = "there mostly the epoch best on the test images"


@pytest.mark.parametrize(
    ("fields", "manifest", "says"),
    [
        (
            {"epochs": 64},
            MANIFEST,
            [
                "images: 8,677 of a pool of 10,847 trained on, 8,928 tested on; there 10,847 and "
                "10,000",
                "subset: drawn by `split_seed`; there that of LDAM's code or another one",
                f"selection: on `val_lt`; {EPOCH_OF_THEIRS}",
            ],
        ),
        (
            {"epochs": 200, **LITERATURE},
            None,
            [f"selection: none, the last epoch; {EPOCH_OF_THEIRS}"],
        ),
    ],
)
def test_what_differs_from_the_published_figures_is_that_of_the_protocol(
    store, fields, manifest, says
):
    sweep = add_sweep(store)
    add_trial(store, sweep, figures(0.4), manifest=manifest, **fields)
    part = results(sweep).split("### Beside the published figures\n\n")[1].split("\n\n")[0]
    assert part.splitlines() == [
        f"- epochs: {fields['epochs']} here; theirs are in the table",
        *(f"- {line}" for line in says),
        "- seeds: a mean and its interval; there one figure, unless the table says else",
    ]


def test_the_full_schedule_is_not_called_short(store):
    sweep = add_sweep(store)
    add_trial(store, sweep, figures(0.35))
    text = results(sweep).lower()
    assert "short schedule" not in text
    assert "epochs 256" in text


def test_the_literature_protocol_needs_nothing_that_it_does_not_have(store):
    sweep = add_sweep(store)
    recipe = {"epochs": 200, "lr": 0.1, "milestones": "160,180", "shortcut": "pad"}
    for seed in (0, 1):
        values = figures(0.4 + seed / 100)
        add_trial(store, sweep, values, seed=seed, splits="l" * 64, extra=LITERATURE, **recipe)
    text = results(sweep)
    assert "short schedule" not in text.lower()
    assert "two-fold cross-fitted on the test images" in text
    assert "**LDAM's subset**" in text
    assert "own subset" not in text
    assert "no test image selects" not in text.lower()
    assert (Path("docs") / "results_literature_cifar100_if100.png").is_file()


@pytest.mark.parametrize(
    ("fields", "title", "figure"),
    [
        ({"imbalance_factor": 50}, "CIFAR-100-LT, IF 50, ", "cifar100_if50"),
        ({"imbalance_profile": "step"}, "CIFAR-100-LT, step IF 100, ", "cifar100_step-if100"),
        (
            {"images_per_class": 100},
            "CIFAR-100-LT, IF 100, largest class 100, ",
            "cifar100_if100_largest-class-100",
        ),
        (
            {"source": "images", "imbalance_profile": "natural"},
            "source images, natural counts, ",
            "images_natural-counts",
        ),
    ],
)
def test_the_title_says_which_pool_it_was(store, fields, title, figure):
    sweep = add_sweep(store)
    add_trial(store, sweep, figures(0.4), **fields)
    text = results(sweep)
    assert f"## {title}protocol experts\n" in text
    assert [p.name for p in Path("docs").glob("*.png")] == [f"results_experts_{figure}.png"]
    assert "ublished figures" not in text


@pytest.mark.parametrize(
    ("config", "fields", "says"),
    [
        ("demo", {"source": "synthetic", "epochs": "DEMO"}, ""),
        ("demo", {"source": "synthetic", "epochs": 1}, "(1 of DEMO epochs)"),
        ("strong", {"epochs": 250}, "(250 of 400 epochs)"),
        ("strong", {"epochs": 400}, ""),
        ("literature", {"epochs": 200}, ""),
        ("my/own.yaml", {"epochs": 199}, "(199 of 200 epochs)"),
        ("my/own.yaml", {"epochs": 199, "source": "images"}, ""),
    ],
)
def test_short_is_what_is_shorter_than_the_recipe(store, config, fields, says):
    of_demo = str(load_config("demo", {}).epochs)
    protocol = "experts" if config == "demo" else "literature"
    sweep = add_sweep(store, grid=f"config: {config}\ngrid: {{seed: [0]}}")
    fields = {n: of_demo if v == "DEMO" else v for n, v in fields.items()} | {"protocol": protocol}
    add_trial(store, sweep, figures(0.4), **fields)
    (title, *_) = re.findall(r"^## (.*)$", results(sweep), flags=re.M)
    _, _, told = title.partition(", short schedule ")
    assert told == says.replace("DEMO", of_demo)


def test_how_long_the_recipe_was_is_what_the_sweep_recorded(store):
    """Not what a file of that name says where `results` is typed, if there is one."""
    sweep = add_sweep(store, grid="config: sub/long.yaml\ngrid: {seed: [0]}")
    MlflowClient().set_tag(sweep, "recipe_epochs", '{"experts": 600}')
    add_trial(store, sweep, figures(0.4), epochs=300)
    text = results(sweep)
    assert "short schedule (300 of 600 epochs)" in text
    assert "config: sub/long.yaml" in text


def test_each_sweep_has_its_part_and_its_figure(short, store):
    other = add_sweep(store)
    add_trial(store, other, figures(0.4), splits="l" * 64, extra=LITERATURE, epochs=200)
    again = add_sweep(store)
    add_trial(store, again, figures(0.3), epochs=64)
    text = results(short, other, again)
    titles = re.findall(r"^## (.*)$", text, flags=re.M)
    assert [title.split(", ")[2] for title in titles[:3]] == [
        "protocol experts",
        "protocol literature",
        "protocol experts",
    ]
    names = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert len(set(names)) == 3
    for name in names:
        with Image.open(Path("docs") / name) as picture:
            assert picture.format == "PNG"
    assert set(names) == {p.name for p in Path("docs").iterdir()} - {"results.md"}


def test_the_page_says_how_it_was_made_and_not_where(short, tmp_path):
    text = results(short)
    command = f"python -m longtail_experts results --sweeps {short} --out docs/results.md"
    assert command in text
    assert "config: own.yaml\n" in text
    assert "loss: [ce, logit_adjust]\n" in text
    assert "data_dir: [<images>, <images>, none]\n" in text
    assert "data_dir: <images>, epochs: 64" in text
    again = f"{MLFLOW_RUN} -P loss=logit_adjust -P config=cifar100_lt -P epochs=64"
    assert re.search(f"^{again} .*-P data_dir=<images>$", text, re.MULTILINE)
    assert "Recipe: shortcut projection, epochs 64, batch_size 128, augmentation plain, " in text
    assert "git.commit cccccccccccc" in text
    assert "precision fp32" in text
    absolute = results(short, out=str(tmp_path / "elsewhere" / "page.md"))
    assert "--out page.md" in absolute
    for page in (text, absolute):
        assert "/home" not in page
        assert str(tmp_path) not in page


def test_equal_stores_give_equal_pages(short, drawn_figures):
    def page() -> dict[str, bytes]:
        results(short)
        return {path.name: path.read_bytes() for path in Path("docs").iterdir()}

    first = page()
    assert len(first) == 2  # the page and its figure
    assert page() == first


def test_published_figures_stand_beside_what_they_are_comparable_with(short, store):
    text = results(short)
    (part,) = text.split("## Published figures")[1:]
    rows = [line.strip("| ").split(" | ") for line in part.splitlines() if line.startswith("|")]
    shown = [(row[0], row[1], *row[-3:]) for row in rows[2:]]
    assert rows[0][-3:] == ["top-1, %", "many / medium / few", "ECE, %"]
    assert shown == [
        (
            one.method,
            one.paper,
            f"{one.top1:.2f}",
            "-" if one.by_class is None else "{:.1f} / {:.1f} / {:.1f}".format(*one.by_class),
            "-" if one.ece is None else f"{one.ece:.2f}",
        )
        for one in PUBLISHED
    ]
    assert {row[-1] for row in shown} > {"-"}
    assert "None was measured here" in part
    assert "### Beside the published figures" in text
    elsewhere = add_sweep(store)
    add_trial(store, elsewhere, figures(0.5), imbalance_factor=10)
    assert "ublished figures" not in results(elsewhere)


def test_published_figures_name_their_sources():
    for one in PUBLISHED:
        assert one.url.startswith("https://")
        assert re.search(r"(19|20)\d\d$", one.paper), one.paper
        assert 35 < one.top1 < 60
        assert one.by_class is None or len(one.by_class) == 3
        assert one.recipe
        assert one.selection


def test_synthetic_images_are_called_so(store):
    sweep = add_sweep(store)
    add_trial(store, sweep, figures(0.9), source="synthetic", data_dir="none")
    assert "Synthetic images" in results(sweep).split("\n## ")[1]


def test_trials_that_were_finished_before_the_sweep_count(short, store):
    """As the sweep's trials.json lists them; children of another run."""
    found = add_trial(
        store, add_sweep(store), figures(0.4), loss="ce", seed=7, epochs=64, milestones="24,48"
    )
    trials = [{"run_id": found, "state": "found"}, {"run_id": None, "state": "waiting"}]
    MlflowClient().log_text(short, json.dumps(trials), "trials.json")
    assert re.search(r"\| ce \| 4 \|", results(short))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--sweeps", "nonsense", "--out", "new/a.md"], "sweeps=nonsense: not found"),
        (["--sweeps", "ID,ID", "--out", "a.md"], "is given 2 times"),
        (["--sweeps", "ID", "--out", "a.html"], "out=a.html: give the name of a Markdown file"),
        (["--sweeps", "ID", "--out", "file/a.md"], "out=file/a.md: cannot be written"),
        (["--sweeps", ",", "--out", "a.md"], "sweeps=',': give run ids"),
        (["--sweeps", "ID"], "--out"),
        (["--sweeps", "BROKEN", "--out", "a.md"], "trials.json is malformed"),
        (["--sweeps", "ID", "--out", "caf\udce9.md"], "out=caf?.md: must be UTF-8 text"),
        (["--sweeps", "ID", "--out", "notes"], "give the name of a Markdown file"),
    ],
)
def test_what_cannot_be_written_is_said_in_one_line(store, capsys, arguments, says):
    sweep, broken = add_sweep(store), add_sweep(store)
    add_trial(store, sweep, figures(0.4))
    MlflowClient().log_text(broken, '[{"state": 1}]', "trials.json")
    Path("file").touch()
    given = [
        re.sub("ID|BROKEN", lambda m: {"ID": sweep, "BROKEN": broken}[m.group()], a)
        for a in arguments
    ]
    assert main(["results", *given]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert says in line
    assert not list(Path().glob("*.md"))
    assert not Path("new").exists()


@pytest.mark.parametrize(
    ("artifact", "content"),
    [
        ("sweep.yaml", b"\xff\xfe"),
        ("sweep.yaml", b"grid: {seed: [2024-13-45]}"),
        ("splits/manifest.json", b'{"pool_counts": [1e999], "splits": {}}'),
        ("splits/manifest.json", json.dumps({**MANIFEST, "pool_counts": [1e999]}).encode()),
        ("splits/manifest.json", b"[" * 100_000),
        ("config.yaml", b"seed: abc"),
        ("config.yaml", b"lr: 1.0e+400\nepochs: 1.0e+400"),
    ],
)
def test_an_artifact_that_is_damaged_is_named_in_one_line(
    short, store, tmp_path_factory, capsys, artifact, content
):
    damaged = tmp_path_factory.mktemp("damaged") / Path(artifact).name
    damaged.write_bytes(content)
    experiment = MlflowClient().get_run(short).info.experiment_id
    trial = MlflowClient().search_runs(
        [experiment], f"tags.mlflow.parentRunId = '{short}'", order_by=["start_time ASC"]
    )[0]
    run_id = short if artifact == "sweep.yaml" else trial.info.run_id
    MlflowClient().log_artifact(run_id, str(damaged), str(Path(artifact).parent).strip("."))
    assert main(["results", "--sweeps", short, "--out", "a.md"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"error: run {run_id}: {artifact}")
    assert not Path("a.md").exists()


def test_a_page_of_its_own_is_replaced_and_no_other(short, store, capsys):
    Path("notes.md").write_text("# by hand")
    assert main(["results", "--sweeps", short, "--out", "notes.md"]) == 2
    assert "out=notes.md: is there, and no page of `results`" in capsys.readouterr().err
    assert Path("notes.md").read_text() == "# by hand"
    for _ in range(2):
        assert main(["results", "--sweeps", short, "--out", "page.md"]) == 0
