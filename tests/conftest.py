"""Shared by all tests: stores that open at once, tiny data, one finished expert."""

import json
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Callable
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
# Before torch is imported: a process a core (pyproject.toml), and a thread a process, here and in
# the programs that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["LONGTAIL_OFFLINE"] = "1"
# Set here for pytest and for the processes that it starts to run tests in.
_pictures = Path(tempfile.gettempdir()) / f"longtail-screenshots-{os.getpid()}"
os.environ.setdefault("LONGTAIL_SCREENSHOTS", str(_pictures))
os.environ["MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING"] = "false"  # other figures are looked at here

CLASS_COUNTS = {"ant": 30, "bee": 22, "cat": 14, "dog": 8, "eel": 5}
# Of each field of the config, a value that is not its default.
OTHER = {
    **{"loss": "balanced_softmax", "tau": 2, "source": "images", "imbalance_factor": 10},
    **{"imbalance_profile": "step", "images_per_class": 7, "split_seed": 1, "seed": 1},
    **{"expert_seed": 5, "shortcut": "pad", "epochs": 3, "batch_size": 64, "lr": 0.1},
    **{"momentum": 0.5, "weight_decay": 0, "milestones": (1,), "lr_decay": 0.5},
    **{"warmup_steps": 5, "validation_every": 1, "early_stopping_patience": 2},
    **{"checkpoint_every": 3, "precision": "bf16", "fast": False, "fused": True},
    **{"data_dir": "elsewhere", "device": "cpu", "register_as": "name", "preflight": False},
    **{"beta": 0.9, "gamma": 1, "reweight_from": 3, "protocol": "literature"},
    **{"subset_rule": "ldam", "augmentation": "autoaugment", "cutout": 16, "mixup": 0.2},
    **{"lr_schedule": "cosine", "warmup_epochs": 5},
}
TINY_EXPERT = {
    "source": "images",
    "imbalance_profile": "natural",
    "epochs": "6",
    "batch_size": "8",
    "lr": "0.025",
    "milestones": "4",
    "warmup_steps": "4",
    "validation_every": "2",
    "checkpoint_every": "4",
    "device": "cpu",
    "precision": "fp32",
}


def pytest_collection_modifyitems(items):
    missing = {
        "real": None if os.environ.get("LONGTAIL_DATA_DIR") else "LONGTAIL_DATA_DIR is not set",
        "gpu": None if _has_gpu() else "no CUDA device",
        "slow": None if os.environ.get("LONGTAIL_SLOW") == "1" else "LONGTAIL_SLOW is not 1",
        "browser": _missing_browser(),
    }
    for item in items:
        for marker, reason in missing.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _missing_browser() -> str | None:
    if not shutil.which("chromium"):
        return "no chromium on PATH"
    return None if find_spec("playwright") else "playwright is not installed"


@pytest.fixture(scope="session")
def screenshots() -> Path:
    """Where the browser's tests keep what they saw."""
    folder = Path(os.environ["LONGTAIL_SCREENSHOTS"])
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def pytest_terminal_summary(terminalreporter):
    folder = Path(os.environ["LONGTAIL_SCREENSHOTS"])
    if pictures := sorted(folder.glob("*.png")):
        terminalreporter.write_line(f"{len(pictures)} screenshots of pages: {folder}")


@pytest.fixture(scope="session")
def real_data_dir() -> str:
    return os.environ["LONGTAIL_DATA_DIR"]


@pytest.fixture(scope="session")
def migrated_database(tmp_path_factory) -> Path:
    """An empty store; opening a copy takes milliseconds where creating one takes seconds."""
    folder = tmp_path_factory.mktemp("migrated")
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    SqlAlchemyStore(f"sqlite:///{folder / 'mlflow.db'}", str(folder / "mlruns"))
    return folder / "mlflow.db"


def use_small_network(patch: pytest.MonkeyPatch) -> None:
    """ResNet-8: one block a stage, and a step in a quarter of ResNet-32's time."""
    from longtail_experts.learning import resnet

    patch.setattr(resnet, "BLOCKS_PER_STAGE", 1)


@pytest.fixture(autouse=True)
def small_network(request, monkeypatch) -> None:
    """What a stage does around its network does not depend on its depth. ResNet-32 itself is
    trained where this is overridden, on a GPU and, on real images too, by `.ci/run`.
    """
    if not request.node.get_closest_marker("gpu"):
        use_small_network(monkeypatch)


def use_blank_figures(patch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Figures of one pixel: to draw those of an expert takes longer than a tiny training. Returns
    what draws real ones."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    draw = FigureCanvasAgg.print_png
    patch.setattr(FigureCanvasAgg, "print_png", lambda _, path: Image.new("L", (1, 1)).save(path))
    return draw


@pytest.fixture(autouse=True)
def blank_figures(monkeypatch) -> Callable[..., None]:
    """The experts of `three_experts` have real ones."""
    return use_blank_figures(monkeypatch)


@pytest.fixture
def drawn_figures(blank_figures, monkeypatch) -> None:
    """Real ones, for a test that looks at them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    monkeypatch.setattr(FigureCanvasAgg, "print_png", blank_figures)


def use_store(folder: Path, database: Path, monkeypatch) -> Path:
    """Make `folder` the working folder, with a store of its own where MLflow looks by default."""
    import mlflow

    shutil.copy(database, folder / "mlflow.db")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "tests")
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    monkeypatch.setenv("LONGTAIL_CACHE_DIR", str(folder / ".cache"))
    mlflow.tracking.fluent._active_experiment_id = None
    return folder


@pytest.fixture
def store(tmp_path, migrated_database, monkeypatch) -> Path:
    return use_store(tmp_path, migrated_database, monkeypatch)


@pytest.fixture(scope="session")
def once(tmp_path_factory) -> Callable[[str, Callable[[], Any]], Any]:
    """(name, make) -> what `make` returns, called by one of the processes that run these tests."""
    own = tmp_path_factory.getbasetemp()
    common = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own

    def once(name: str, make: Callable[[], Any]) -> Any:
        made = common / f"{name}.json"
        with FileLock(f"{made}.lock"):
            if not made.exists():
                made.write_text(json.dumps(make()))
            return json.loads(made.read_text())

    return once


@pytest.fixture(scope="session")
def image_folder(once, tmp_path_factory) -> Path:
    """Five classes of noisy coloured squares, 30 ... 5 to train and 20 each to test."""
    return Path(once("images", lambda: str(_draw_images(tmp_path_factory.mktemp("images")))))


def _draw_images(folder: Path) -> Path:
    random = np.random.RandomState(0)
    for c, (name, count) in enumerate(CLASS_COUNTS.items()):
        colour = random.randint(60, 200, (4, 4, 3)).repeat(8, 0).repeat(8, 1)
        for half, number in (("train", count), ("test", 20)):
            (folder / half / name).mkdir(parents=True)
            for i in range(number):
                noise = random.randint(-90, 90, (32, 32, 3))
                pixels = np.clip(colour + noise, 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / half / name / f"{c}-{i:03}.png")
    return folder


@pytest.fixture(scope="session")
def tiny_arguments(image_folder) -> list[str]:
    fields = {**TINY_EXPERT, "data_dir": str(image_folder), "config": "cifar100_lt"}
    return arguments_of(fields)


def arguments_of(fields: dict[str, object]) -> list[str]:
    """As on a command line."""
    return [part for name, value in fields.items() for part in (f"--{name}", str(value))]


@pytest.fixture(scope="session")
def three_experts(once, tmp_path_factory, migrated_database, tiny_arguments) -> dict[str, str]:
    """One store with `main loss=all` in it: folder, parent and child run ids by loss."""
    return once(
        "three-experts",
        lambda: _train_three(
            tmp_path_factory.mktemp("three-experts"), migrated_database, tiny_arguments
        ),
    )


def _train_three(
    folder: Path, migrated_database: Path, tiny_arguments: list[str]
) -> dict[str, str]:
    import mlflow

    from longtail_experts.cli import main

    with pytest.MonkeyPatch.context() as patch:
        use_small_network(patch)
        use_store(folder, migrated_database, patch)
        assert main(["main", "--loss", "all", *tiny_arguments]) == 0
        runs = mlflow.MlflowClient().search_runs([_experiment()])
    found = {"folder": str(folder)}
    for run in runs:
        found[run.data.tags.get("expert", run.data.tags["stage"])] = run.info.run_id
    return found


def _experiment() -> str:
    import mlflow

    return mlflow.get_experiment_by_name("tests").experiment_id


def assert_same_logits(store: Path, run_id: str, three_experts: dict[str, str], loss: str) -> None:
    """Byte for byte those of `main loss=all`, whose experts were trained one after another."""
    pattern = "mlruns/*/{}/artifacts/logits"
    ours = next(store.glob(pattern.format(run_id)))
    theirs = next(Path(three_experts["folder"]).glob(pattern.format(three_experts[loss])))
    names = {path.name for path in theirs.iterdir()}
    assert len(names) == 8  # seven splits and the manifest
    for name in names:
        assert (theirs / name).read_bytes() == (ours / name).read_bytes(), name


@pytest.fixture
def finished(three_experts, tmp_path, monkeypatch) -> dict[str, str]:
    """The finished experts, seen from an empty working folder; not to be changed."""
    monkeypatch.chdir(tmp_path)
    database = Path(three_experts["folder"]) / "mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{database}")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "tests")
    return three_experts


@pytest.fixture(scope="session")
def own_expert(three_experts, tmp_path_factory) -> Path:
    """A copy of `ce`, whose artifacts are in it: a folder with mlflow.db and artifacts/."""
    source, folder = Path(three_experts["folder"]), tmp_path_factory.mktemp("own")
    shutil.copy(source / "mlflow.db", folder)
    artifacts = next(source.glob(f"mlruns/*/{three_experts['ce']}/artifacts"))
    shutil.copytree(artifacts, folder / "artifacts")
    with closing(sqlite3.connect(folder / "mlflow.db")) as database, database:
        moved = (str(folder / "artifacts"), three_experts["ce"])
        database.execute("UPDATE runs SET artifact_uri = ? WHERE run_uuid = ?", moved)
    return folder


@pytest.fixture
def editable(own_expert, three_experts, tmp_path, monkeypatch) -> tuple[str, Path]:
    """A finished expert that may be tampered with: its run id, its artifacts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{own_expert}/mlflow.db")
    artifacts, keep = own_expert / "artifacts", tmp_path / "keep"
    shutil.copytree(artifacts, keep)
    yield three_experts["ce"], artifacts
    shutil.rmtree(artifacts)
    shutil.copytree(keep, artifacts)


def change_json(path: Path, change: Callable[[Any], object]) -> None:
    """What `change` returns, or has done to the content, is the file's new content."""
    content = json.loads(path.read_text())
    result = change(content)
    path.write_text(json.dumps(content if result is None else result))


@pytest.fixture
def experts_copy(finished, tmp_path, monkeypatch) -> dict[str, str]:
    """The finished experts in a copy of their store, to which runs may be added."""
    import mlflow

    shutil.copy(Path(finished["folder"]) / "mlflow.db", tmp_path / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    mlflow.tracking.fluent._active_experiment_id = None
    return finished
