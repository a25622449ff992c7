"""Imports point one way: cli -> stages -> {tracking, learning, data}."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from longtail_experts.cli import ENTRY_POINTS

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "longtail_experts"
ALLOWED = {
    "cli": {"stages", "tracking", "learning", "data", "config"},
    "stages": {"stages", "tracking", "learning", "data", "config"},
    "tracking": {"tracking", "learning", "data", "config"},
    "learning": {"learning"},
    "data": {"data"},
    "config": set(),
}
# Beside numpy, torch and the standard library; `learning` and `data` run where only these are.
THIRD_PARTY = {"torch", "torchvision", "numpy", "scipy", "pyarrow", "PIL", "tqdm", "triton"}
THIRD_PARTY |= {"filelock"}  # of data/locks.py, which is imported where files are fetched


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


MODULES = [path for path in PACKAGE.rglob("*.py") if room(path) in ALLOWED]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_arrows_point_one_way(path):
    for name in imports(path):
        if name.startswith("longtail_experts."):
            assert name.split(".")[1] in ALLOWED[room(path)], name
        if room(path) in ("learning", "data"):
            top = name.split(".")[0]
            known = THIRD_PARTY | set(sys.stdlib_module_names) | {"longtail_experts"}
            assert top in known, name
        if room(path) != "tracking":
            assert name.split(".")[0] not in ("mlflow", "matplotlib"), name


# `main` is made of others; a trial of a sweep is `main` for one loss, by the same code.
MADE_OF_OTHERS = {"main": {"train", "calibrate", "compare"}, "trial": {"main"}}


def test_no_stage_imports_another_but_those_made_of_them():
    stages = set(ENTRY_POINTS)
    for path in (PACKAGE / "stages").glob("*.py"):
        used = {
            name.split(".")[2]
            for name in imports(path)
            if name.startswith("longtail_experts.stages.")
        }
        others = used & stages
        assert others == MADE_OF_OTHERS.get(path.stem, set()), path.stem


def test_the_command_line_starts_without_torch_and_mlflow():
    code = (
        "import sys; from longtail_experts.cli import main\n"
        "assert main(['main', '--config', 'cifar100_lt', '--lr', '-1']) == 2\n"
        "assert not {'torch', 'mlflow', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent, timeout=60)


def test_what_takes_seconds_to_import_waits_until_it_is_needed():
    """torchvision brings torch's compiler; a refusal needs neither torch nor mlflow."""
    program = (
        "import sys\n"
        "from longtail_experts import cli\n"
        "early = {'torch', 'mlflow', 'matplotlib'} & set(sys.modules)\n"
        "from longtail_experts.stages import compare, main, preflight\n"
        "late = {'torchvision', 'torch._dynamo', 'torch._inductor', 'sklearn'} & set(sys.modules)\n"
        "print(sorted(early), sorted(late))\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert found.stdout == "[] []\n"
