"""MLproject, conda.yaml and pyproject.toml agree with each other and with the command line."""

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
import yaml
from packaging.requirements import Requirement

from longtail_experts.cli import ENTRY_POINTS
from longtail_experts.config import Config, load_config
from longtail_experts.stages.inputs import schedule_of
from longtail_experts.tracking.report import signed

ROOT = Path(__file__).resolve().parents[1]
MLPROJECT = yaml.safe_load((ROOT / "MLproject").read_text())
CONDA = yaml.safe_load((ROOT / "conda.yaml").read_text())
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_entry_points_are_those_of_the_command_line():
    assert set(MLPROJECT["entry_points"]) == set(ENTRY_POINTS)
    for name, entry in MLPROJECT["entry_points"].items():
        assert f"python -m longtail_experts {name} " in entry["command"]
        for parameter in entry["parameters"]:
            assert f"--{parameter} {{{parameter}}}" in entry["command"]


def test_conda_pins_lie_inside_the_ranges_of_pyproject():
    (pip,) = [d["pip"] for d in CONDA["dependencies"] if isinstance(d, dict)]
    pins = {Requirement(line).name: Requirement(line) for line in pip}
    ranges = {r.name: r for r in map(Requirement, PYPROJECT["project"]["dependencies"])}
    assert set(pins) == set(ranges)
    for name, pin in pins.items():
        (only,) = pin.specifier
        assert only.operator == "=="
        assert ranges[name].specifier.contains(only.version), name


def test_only_third_party_packages_are_in_the_environment():
    assert "-e" not in (ROOT / "conda.yaml").read_text().split()
    assert "python=3.11" in CONDA["dependencies"]


@pytest.mark.parametrize("name", ["cifar100_lt", "demo", "literature", "strong"])
def test_recipes_are_cards(name):
    text = (ROOT / "configs" / f"{name}.yaml").read_text()
    assert text.startswith("# ")
    for word in ("purpose", "command"):
        assert word in text
    assert load_config(name, {})


def test_the_full_recipe_is_the_default_of_every_field():
    assert load_config("cifar100_lt", {}) == Config()


def test_the_literature_card_is_the_recipe_of_ldam():
    """Epochs counted from 1, as the authors do: lr e / 5, x0.01 after 160, x0.0001 after 180."""
    config = load_config("literature", {})
    assert (config.protocol, config.subset_rule, config.shortcut) == ("literature", "ldam", "pad")
    assert (config.batch_size, config.weight_decay, config.momentum) == (128, 2e-4, 0.9)
    assert (config.augmentation, config.cutout, config.mixup) == ("plain", 0, 0)
    lr_of = schedule_of(config, steps_per_epoch=85)
    for epoch, rate in ((1, 0.02), (4, 0.08), (5, 0.1), (160, 0.1), (161, 1e-3), (181, 1e-5)):
        assert lr_of((epoch - 1) * 85) == pytest.approx(rate)
    assert config.epochs == 200


def test_the_strong_card_is_long_and_augmented():
    config = load_config("strong", {})
    assert (config.augmentation, config.cutout, config.mixup) == ("autoaugment", 16, 0.4)
    assert (config.epochs, config.lr_schedule, config.milestones) == (400, "cosine", ())
    lr_of = schedule_of(config, steps_per_epoch=85)
    assert lr_of(200 * 85) == pytest.approx(0.05)


def test_all_that_a_run_holds_is_in_docs_run(finished):
    text = (ROOT / "docs" / "run.md").read_text().replace("<test>/", "{test_lt,test_balanced}/")
    named = re.findall(r"`([^` ]+)`", text)
    named.remove("<test>")
    patterns = [re.sub(r"<\w+>", r"\\w+", re.escape(name)) for name in named]  # <split>
    patterns = [re.sub(r"\\{(.+?)\\}", _either, pattern) for pattern in patterns]  # {head,tail}
    patterns += [rf"ensemble_(mean|product)/{p}" for p in patterns if "/" not in p]
    known = re.compile("|".join(patterns))
    client = mlflow.MlflowClient()
    for name in ("ce", "all"):
        data = client.get_run(finished[name]).data
        found = {*data.metrics, *data.tags, *files_of(client, finished[name])}
        found = {n.removeprefix("test_balanced/") if name == "all" else n for n in found}
        unknown = {n for n in found if not n.startswith("mlflow.") and not known.fullmatch(n)}
        assert not unknown, name
        assert len(found) > 30


def test_docs_run_names_every_stage():
    lines = (ROOT / "docs" / "run.md").read_text().splitlines()
    row = next(line for line in lines if line.startswith("| `stage` |"))
    source = "".join(path.read_text() for path in (ROOT / "src").rglob("*.py"))
    named_in_code = re.findall(r'"stage": "(\w+)"', source)
    stages = {*ENTRY_POINTS, *named_in_code, "refused"}
    assert {"resume", "all"} < stages
    assert not [stage for stage in stages if f"`{stage}`" not in row]


def _either(found: re.Match) -> str:
    return f"({found[1].replace(',', '|')})"


def files_of(client: mlflow.MlflowClient, run_id: str, folder: str | None = None) -> Iterator[str]:
    for file in client.list_artifacts(run_id, folder):
        yield from files_of(client, run_id, file.path) if file.is_dir else [file.path]


@pytest.mark.slow
def test_what_the_launcher_shows_of_a_refusal(store):
    """`mlflow run`, for real: the run that it makes ends FAILED, and its page says why."""
    import mlflow

    (store / "src").symlink_to(ROOT / "src")
    for name in ("MLproject", "conda.yaml"):
        (store / name).symlink_to(ROOT / name)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = [sys.executable, "-m", "mlflow", "run", ".", "--env-manager", "local"]
    done = subprocess.run(
        [*command, "-P", "config=demo", "-P", "warmup_step=5"],
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    reason = "unknown field 'warmup_step'; did you mean warmup_steps?"
    assert done.returncode != 0
    assert f"error: {reason}\n" in done.stderr
    (run,) = mlflow.search_runs(experiment_names=["tests"], output_format="list")
    assert run.info.status == "FAILED"
    assert run.data.tags["mlflow.note.content"] == signed(f"**Not started.** {reason}")
