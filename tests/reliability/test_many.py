"""Many trainings into one store that did not exist before; a server that goes away."""

import os
import shutil
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient
from reliability.harness import Training, history, journal_lines, training_runs, wait_until
from reliability.servers import PostgreSQL, TrackingServer

from longtail_experts.tracking.recorder import local_folder

pytestmark = pytest.mark.slow
WRITERS = 8
needs_postgresql = pytest.mark.skipif(
    PostgreSQL.program("initdb") is None or find_spec("psycopg") is None,
    reason="needs Debian's postgresql and the package psycopg[binary]",
)


@pytest.fixture
def empty_folder(tmp_path, monkeypatch) -> Path:
    """No store yet; runs of the experiment `tests` will go where the test says."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "tests")
    monkeypatch.setenv("LONGTAIL_CACHE_DIR", str(tmp_path / ".cache"))
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    mlflow.tracking.fluent._active_experiment_id = None
    return tmp_path


@pytest.fixture
def sqlite_server(empty_folder, monkeypatch):
    server = TrackingServer(empty_folder, f"sqlite:///{empty_folder / 'server.db'}")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
    yield server
    server.stop()


@pytest.fixture
def postgresql_server(empty_folder, monkeypatch):
    database = PostgreSQL()
    try:
        server = TrackingServer(empty_folder, database.uri)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
        yield server
        server.stop()
    finally:
        database.stop()


def eight_train(folder: Path, arguments: list[str]) -> None:
    """All finish, every point of every run is in the store once, every artifact too."""
    short = [*arguments, "--epochs=2", "--milestones=none", "--batch_size=32"]
    trainings = [
        Training(folder, ["train", "--loss", "ce", *short, f"--seed={seed}"])
        for seed in range(WRITERS)
    ]
    for training in trainings:
        assert training.wait(400) == 0, training.output
    runs = training_runs()
    assert len(runs) == WRITERS
    assert {run.info.status for run in runs} == {"FINISHED"}
    expected = {
        name: [s for s, _ in points] for name, points in history(runs[0].info.run_id).items()
    }
    assert len(expected["lr"]) >= 4
    for run in runs:
        points = history(run.info.run_id)
        best = {name for name in points if name.startswith("best/")}
        for name in expected.keys() - best:
            assert [step for step, _ in points[name]] == expected[name], name
        names = {
            file.path for file in MlflowClient().list_artifacts(run.info.run_id, "checkpoints")
        }
        assert names == {"checkpoints/best.pt", "checkpoints/last.pt"}


def test_eight_processes_into_one_fresh_sqlite_store(empty_folder, monkeypatch, tiny_arguments):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{empty_folder / 'mlflow.db'}")
    eight_train(empty_folder, tiny_arguments)


@needs_postgresql
def test_eight_processes_into_a_server_with_postgresql(
    empty_folder, postgresql_server, tiny_arguments
):
    eight_train(empty_folder, tiny_arguments)


@pytest.fixture
def training_cut_off(empty_folder, sqlite_server, tiny_arguments):
    """A training that had begun to record when its server was stopped. It is halted meanwhile,
    so that it cannot be done before the server is."""

    def start(**environment: str) -> tuple[Training, str]:
        arguments = ["train", "--loss", "ce", *tiny_arguments]
        training = Training(empty_folder, arguments, **environment)
        wait_until(lambda: journal_lines(empty_folder) > 5)
        training.kill(signal.SIGSTOP)
        (run,) = training_runs()
        sqlite_server.stop()
        training.kill(signal.SIGCONT)
        return training, run.info.run_id

    return start


def test_training_goes_on_while_the_server_is_away(training_cut_off, sqlite_server, empty_folder):
    training, run_id = training_cut_off()
    recorded = journal_lines(empty_folder)
    wait_until(lambda: journal_lines(empty_folder) > recorded + 10)
    wait_until(lambda: "training goes on" in training.output, what=training.output)
    assert training.process.exitcode is None
    sqlite_server.start()
    assert training.wait() == 0, training.output
    assert "is back" in training.output
    assert len(history(run_id)["train/loss"]) == 6
    assert MlflowClient().get_run(run_id).info.status == "FINISHED"


def test_a_server_that_stays_away_costs_nothing_but_a_resume(training_cut_off, sqlite_server):
    training, run_id = training_cut_off(LONGTAIL_STORE_PATIENCE="2")
    assert training.wait() == 1, training.output
    last = training.output.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert f"-P resume={run_id}" in last
    assert local_folder(run_id).exists()
    sqlite_server.start()
    resumed = Training(Path.cwd(), ["train", "--resume", run_id])
    assert resumed.wait() == 0, resumed.output
    assert [step for step, _ in history(run_id)["epoch"]] == sorted(
        {step for step, _ in history(run_id)["epoch"]}
    )
    assert len(history(run_id)["train/loss"]) == 6


def test_reap_delivers_what_a_killed_training_could_not(
    training_cut_off, sqlite_server, empty_folder
):
    training, run_id = training_cut_off()
    recorded = journal_lines(empty_folder)
    wait_until(lambda: journal_lines(empty_folder) > recorded + 4)
    training.kill(signal.SIGKILL)
    training.wait()
    sqlite_server.start()
    before = sum(map(len, history(run_id).values()))
    reaping = Training(empty_folder, ["reap"])
    assert reaping.wait() == 0, reaping.output
    assert MlflowClient().get_run(run_id).info.status == "FAILED"
    assert sum(map(len, history(run_id).values())) == journal_lines(empty_folder) > before


@pytest.mark.skipif(
    shutil.which("unshare") is None
    or subprocess.run(
        ["unshare", "-Urm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"],
        check=False,
        capture_output=True,
    ).returncode
    != 0,
    reason="this kernel lets a test mount no small disk",
)
def test_a_disk_that_fills_up_in_mid_run(empty_folder, tiny_arguments, monkeypatch):
    """A disk of 40 MB, filled once training has begun."""
    disk = empty_folder / "disk"
    disk.mkdir()
    code = (
        "import sys, threading, time, pathlib\n"
        "from longtail_experts.cli import main\n"
        "disk = pathlib.Path(sys.argv[1])\n"
        "def fill():\n"
        "    while not list(disk.glob('runs/*/last.pt')): time.sleep(0.005)\n"
        "    with (disk / 'filler').open('wb') as file:\n"
        "        try:\n"
        "            while True: file.write(bytes(100_000)); file.flush()\n"
        "        except OSError: pass\n"
        "threading.Thread(target=fill, daemon=True).start()\n"
        "code = main(sys.argv[2:])\n"
        "print('exit', code)\n"
        "(disk / 'filler').unlink()\n"
        "run_id = next(disk.glob('runs/*')).name\n"
        "print('resumed', main(['train', '--resume', run_id]))\n"
    )
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{empty_folder / 'mlflow.db'}")
    monkeypatch.setenv("LONGTAIL_CACHE_DIR", str(disk))
    arguments = [*tiny_arguments, "--checkpoint_every=1", "--epochs=8"]
    command = [sys.executable, "-c", code, str(disk), "train", "--loss", "ce", *arguments]
    mounted = 'mount -t tmpfs -o size=40m tmpfs "$0" && exec "$@"'
    done = subprocess.run(
        ["unshare", "-Urm", "sh", "-c", mounted, str(disk), *command],
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert "exit 1" in done.stdout, done.stdout + done.stderr
    assert "make room, then -P resume=" in done.stderr
    assert "resumed 0" in done.stdout, done.stdout + done.stderr
    (run,) = training_runs()
    assert len(history(run.info.run_id)["train/loss"]) == 8
