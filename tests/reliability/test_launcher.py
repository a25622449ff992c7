"""What `mlflow run` itself does with hostile values, signals and resumption."""

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import psutil
import pytest
from mlflow import MlflowClient
from mlflow.projects.utils import get_entry_point_command, load_project
from reliability.harness import (
    PATIENCE,
    Training,
    assert_same_training,
    journal_lines,
    training_runs,
    wait_until,
)

from longtail_experts import cli
from longtail_experts.cli import ENTRY_POINTS, OPTIONAL, OWN_PARAMETERS, RESUMABLE, main
from longtail_experts.config import Config

ROOT = Path(__file__).resolve().parents[2]
# None of these is a value of any parameter; each would create `pwned` if a shell saw it bare.
HOSTILE = {
    "substitution": "$(touch pwned)",
    "backticks": "`touch pwned`",
    "semicolon": "x; touch pwned;",
    "and": "x && touch pwned",
    "or": "|| touch pwned",
    "pipe": "x | touch pwned",
    "background": "x & touch pwned &",
    "redirect": "x > pwned",
    "single quotes": "'; touch pwned; '",
    "double quotes": '"; touch pwned; "',
    "both quotes": "'\"'\"; touch pwned",
    "backslash": "\\'; touch pwned; \\",
    "newline": "x\ntouch pwned\n",
    "spaces": "  x  touch   pwned  ",
    "glob": "*",
    "variable": "${PATH}/../pwned",
    "braces": "{loss} {0.__class__} {{}}",
    "flag": "--help",
    "another field": "--config=../pwned",
    "traversal": "../../../../../../../../etc/passwd",
    "absolute": "/etc/passwd",
    "SQL": "' OR 1=1; DROP TABLE runs; --",
    "control": "x\x1b[2Jx\x07\r",
    "long": "$(touch pwned)" * 1000,
    "not UTF-8": "\udcff\udcfe",
}


def parameters_of(entry_point: str) -> list[str]:
    """All that a user can give with -P. The fields are the same everywhere: once is enough."""
    own = list(OWN_PARAMETERS.get(entry_point, {}))
    if not own:
        own = ["loss", "config"] if entry_point != "data" else ["config"]
    if entry_point in RESUMABLE:
        own.append("resume")
    if entry_point == "main":
        own += [name for name in Config.model_fields if name != "loss"]
    return own


CASES = [(name, parameter) for name in ENTRY_POINTS for parameter in parameters_of(name)]


def command_of(entry_point: str, given: dict[str, str], folder: Path) -> str:
    """The line that `mlflow run` gives to bash."""
    project = load_project(str(ROOT))
    (command,) = get_entry_point_command(project, entry_point, given, str(folder))
    return command


@pytest.fixture
def recorder_of_arguments(tmp_path, monkeypatch) -> Path:
    """A `python` first on PATH that only writes down what it was given; where it does."""
    seen = tmp_path / "seen"
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "python").write_text(f'#!/bin/sh\nprintf "%s\\0" "$@" > {shlex.quote(str(seen))}\n')
    (folder / "python").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return seen


@pytest.mark.parametrize("kind", [kind for kind in HOSTILE if kind != "not UTF-8"])
@pytest.mark.parametrize("entry_point", ENTRY_POINTS)
def test_what_mlflow_run_gives_to_bash_arrives_as_it_was_typed(
    entry_point, kind, recorder_of_arguments, tmp_path
):
    work = tmp_path / "work"
    work.mkdir()
    some = parameters_of(entry_point)[: 5 if kind == "long" else None]  # Linux: 128 KiB a line
    given = dict.fromkeys(some, HOSTILE[kind])
    command = command_of(entry_point, given, tmp_path)
    done = subprocess.run(["bash", "-c", command], cwd=work, capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert not list(work.iterdir())
    arrived = recorder_of_arguments.read_bytes().decode().split("\0")[:-1]
    assert arrived[:3] == ["-m", "longtail_experts", entry_point]
    names, values = arrived[3::2], arrived[4::2]
    assert dict(zip(names, values, strict=True)) == {f"--{n}": v for n, v in given.items()}


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    return cli.parser()


@pytest.mark.parametrize(("entry_point", "parameter"), CASES)
def test_a_hostile_value_of_any_parameter_is_one_line_and_changes_nothing(
    entry_point, parameter, parser, store, capfd, monkeypatch
):
    monkeypatch.setattr(cli, "parser", lambda: parser)  # half of the time is the making of it
    needed = [] if entry_point in OPTIONAL else OWN_PARAMETERS.get(entry_point, {})
    others = [part for name in needed if name != parameter for part in (f"--{name}", "x")]
    before = sorted(path for path in store.rglob("*"))
    for kind, value in HOSTILE.items():
        capfd.readouterr()
        assert main([entry_point, *others, f"--{parameter}", value]) in (1, 2), kind
        (line,) = capfd.readouterr().err.splitlines()
        assert line.startswith("error: "), kind
        assert len(line) < 700, kind
        assert line.isprintable(), kind
    assert sorted(path for path in store.rglob("*")) == before
    assert not MlflowClient().search_runs(["0"], "attributes.status = 'RUNNING'")


def test_an_output_folder_of_any_name_is_that_folder(finished, tmp_path):
    name = "$(touch pwned); `touch pwned` & \n '\" *"
    before = set(tmp_path.iterdir())
    assert main(["export", "--run_ids", finished["ce"], "--out", name]) == 0
    (made,) = set(tmp_path.iterdir()) - before
    assert made.name == name


# --- the launcher itself ------------------------------------------------------------------------


@pytest.fixture
def small_network():
    """Not here: other processes train too."""


@pytest.fixture
def project(store) -> Path:
    """A working folder with the project and an empty store in it, as `mlflow run .` expects."""
    for name in ("MLproject", "conda.yaml", "configs", "src"):
        (store / name).symlink_to(ROOT / name)
    return store


def launch(project: Path, *arguments: str, **environment: str) -> subprocess.Popen:
    """`mlflow run .` in a session of its own, its output in a file."""
    program = shutil.which("mlflow", path=str(Path(sys.executable).parent))
    command = [program, "run", ".", "--env-manager", "local", "--experiment-name", "tests"]
    clean = {
        k: v for k, v in os.environ.items() if k not in ("MLFLOW_EXPERIMENT_NAME", "PYTHONPATH")
    }
    clean["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{clean['PATH']}"
    with (project / f"launched-{time.monotonic_ns()}.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, *arguments],
            cwd=project,
            stdout=log,
            stderr=log,
            env={**clean, **environment},
            start_new_session=True,
        )
    process.log = Path(log.name)
    return process


def fields(arguments: list[str]) -> list[str]:
    """--name value ... as -P name=value ..."""
    pairs = zip(arguments[::2], arguments[1::2], strict=True)
    return [part for n, v in pairs for part in ("-P", f"{n.removeprefix('--')}={v}")]


def children(process: subprocess.Popen) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


@pytest.fixture
def undisturbed(project, tiny_arguments) -> str:
    training = Training(project, ["train", "--loss", "ce", *tiny_arguments])
    assert training.wait() == 0, training.output
    (run,) = training_runs()
    return run.info.run_id


def run_beside(run_id: str) -> mlflow.entities.Run:
    (run,) = (run for run in training_runs() if run.info.run_id != run_id)
    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "whom"),
    [
        (signal.SIGTERM, "the group"),
        (signal.SIGINT, "the group"),
        (signal.SIGTERM, "the training"),
        (signal.SIGKILL, "the group"),
    ],
)
def test_a_training_under_mlflow_run_is_stopped_and_resumed(
    number, whom, project, undisturbed, tiny_arguments
):
    begun = launch(project, "-e", "train", "-P", "loss=ce", *fields(tiny_arguments))
    wait_until(lambda: journal_lines(project) > 8, what=begun.log.read_text())
    if number == signal.SIGKILL:
        wait_until(lambda: list(project.glob(".cache/runs/*/last.pt")))
    started = time.monotonic()
    programs = children(begun)
    if whom == "the group":
        os.killpg(begun.pid, number)
    else:
        programs[-1].send_signal(number)
    assert begun.wait(PATIENCE) != 0
    psutil.wait_procs(programs, PATIENCE)
    seconds = time.monotonic() - started
    run = run_beside(undisturbed)
    run_id, said = run.info.run_id, begun.log.read_text()
    print(f"{signal.Signals(number).name} to {whom}: ended in {seconds:.1f} s, {run.info.status}")
    if number == signal.SIGKILL:
        assert run.info.status == "RUNNING"
    else:
        # A launcher that outlives the program writes FAILED over whatever status it finds.
        outlived = number == signal.SIGINT or whom == "the training"
        assert run.info.status in (("KILLED", "FAILED") if outlived else ("KILLED",))
        assert f"-P resume={run_id} goes on from there" in said
        assert "Traceback" not in said.split("goes on from there")[0]
    how = ("--run-id", run_id) if whom == "the group" else ("-P", f"resume={run_id}")
    resumed = launch(project, "-e", "train", *how)
    assert resumed.wait(PATIENCE) == 0, resumed.log.read_text()
    assert "resuming ce in epoch" in resumed.log.read_text()
    assert MlflowClient().get_run(run_id).info.status == "FINISHED"
    assert_same_training(run_id, undisturbed)
    statuses = {r.info.status for r in MlflowClient().search_runs([run.info.experiment_id])}
    assert statuses == {"FINISHED"}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_the_run_is_opened_leaves_none_running(number, project, tiny_arguments):
    """Of SIGTERM the launcher dies and can set no status; after SIGINT it sends SIGTERM as well."""
    begun = launch(project, "-e", "train", "-P", "loss=ce", *fields(tiny_arguments))

    def has_begun() -> bool:
        return any("longtail_experts" in " ".join(child.cmdline()) for child in children(begun))

    wait_until(has_begun)
    time.sleep(1.5)  # its handler is there, its store not open yet
    programs = children(begun)
    os.killpg(begun.pid, number)
    begun.wait(PATIENCE)
    psutil.wait_procs(programs, PATIENCE)
    found = MlflowClient().get_experiment_by_name("tests").experiment_id
    (run,) = MlflowClient().search_runs([found])
    said = begun.log.read_text()
    outlived = number == signal.SIGINT  # a launcher that does writes FAILED over that
    assert run.info.status in (("KILLED", "FAILED") if outlived else ("KILLED",)), said
    assert ("interrupted" if outlived else "terminated") in said
    assert "interrupts.Terminated" not in said


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["substitution", "newline", "both quotes", "flag", "traversal"])
def test_hostile_values_through_mlflow_run(kind, project):
    before = {path.name for path in project.iterdir()}
    value = HOSTILE[kind]
    for entry_point, parameter, more in (
        ("main", "loss", []),
        ("train", "register_as", []),
        ("data", "config", []),
        ("export", "out", ["-P", "run_ids=x"]),
        ("compare", "tags", []),
    ):
        done = launch(project, "-e", entry_point, "-P", f"{parameter}={value}", *more)
        assert done.wait(PATIENCE) == 1
        said = done.log.read_text()
        lines = [line for line in said.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, said
        assert "Traceback" not in said.split("error: ")[0]
    after = {path.name for path in project.iterdir() if not path.name.startswith("launched-")}
    assert after - before <= {"mlruns", ".cache"}
    found = MlflowClient().get_experiment_by_name("tests").experiment_id
    assert {run.info.status for run in MlflowClient().search_runs([found])} == {"FAILED"}
