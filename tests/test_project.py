"""MLproject, conda.yaml and pyproject.toml agree with each other and with the command line."""

import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from longtail_experts.cli import ENTRY_POINTS
from longtail_experts.config import Config, load_config

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


@pytest.mark.parametrize("name", ["cifar100_lt", "demo"])
def test_recipes_are_cards(name):
    text = (ROOT / "configs" / f"{name}.yaml").read_text()
    assert text.startswith("# ")
    for word in ("purpose", "command"):
        assert word in text
    assert load_config(name, {})


def test_the_full_recipe_is_the_default_of_every_field():
    assert load_config("cifar100_lt", {}) == Config()
