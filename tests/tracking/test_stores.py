"""Stores that cannot be used are told at once, and no password is shown."""

import os
import socket

import mlflow
import pytest
from mlflow.exceptions import MlflowException
from sqlalchemy import make_url
from sqlalchemy.exc import OperationalError

from longtail_experts.cli import _complain, main
from longtail_experts.stages.trial import tail_of
from longtail_experts.tracking import patience
from longtail_experts.tracking.patience import is_transient
from longtail_experts.tracking.registry import register
from longtail_experts.tracking.runs import Run, open_run, start_run
from longtail_experts.tracking.stores import (
    is_file_of_this_host,
    one_store,
    require_answer,
    store_address,
)

TEN_TRIES = "mlflow.store.db.utils.create_sqlalchemy_engine_with_retry"


@pytest.fixture
def away():
    """User, password and address of a server that nobody has started."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        yield f"lab:s3cret@127.0.0.1:{nobody.getsockname()[1]}"


@pytest.mark.parametrize("kind", ["postgresql+psycopg", "http"])
@pytest.mark.parametrize(
    "command", [["data", "--config", "demo", "--images_per_class", "16"], ["reap"]]
)
def test_a_store_that_is_away_is_asked_once(
    command, kind, away, tmp_path, monkeypatch, capfd, caplog
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"{kind}://{away}")
    monkeypatch.setattr(TEN_TRIES, lambda _: pytest.fail("MLflow asked it as well"))
    assert main(command) == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ")
    assert "refused" in line
    assert f"{kind}://lab:***@127.0.0.1" in line
    assert "s3cret" not in line
    assert not caplog.records


def test_what_has_begun_waits_for_a_database_that_is_away(away):
    with pytest.raises(OperationalError) as refused:
        require_answer(f"postgresql+psycopg://{away}/x")
    assert is_transient(refused.value)


def test_a_run_is_begun_in_a_database_that_comes_back(store, monkeypatch):
    """A child's: of a new process, which has not connected before."""
    answer, left = require_answer, [2]

    def comes_back(uri: str) -> None:
        if left[0]:
            left[0] -= 1
            raise OperationalError("connect", {}, ConnectionError("Connection refused"))
        answer(uri)

    monkeypatch.setattr(patience, "FIRST_PAUSE", 0.01)
    with start_run("parent", {"stage": "all"}) as parent:
        monkeypatch.setattr("longtail_experts.tracking.runs.require_answer", comes_back)
        with start_run("child", {"stage": "main"}, parent=parent) as child:
            pass
    assert (left, child.status) == ([0], "FINISHED")


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("sqlite://", "in memory, gone with the process: name a file, as sqlite:///mlflow.db"),
        ("sqlite:///", "in memory"),
        ("sqlite:///:memory:", "in memory"),
        ("sqlite:///:memory:?timeout=30", "in memory"),
        ("sqlite+pysqlite:///:memory:", "in memory"),
        ("sqlite:///file::memory:?cache=shared&uri=true", "in memory"),
        ("sqlite:///file:x?mode=memory&uri=true", "in memory"),
        ("http://[x", ""),
        ("sqlite:////proc/mlflow.db", "the folder cannot be written ("),
        ("sqlite:///folder/", "a folder: name a file in it, as sqlite:///folder/mlflow.db"),
    ],
)
def test_a_store_that_keeps_nothing_is_refused(uri, says, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    (tmp_path / "folder").mkdir()
    assert main(["data", "--config", "demo", "--images_per_class", "16"]) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: no run can be started in {uri}: {says}")
    assert not list((tmp_path / "folder").iterdir())


@pytest.mark.parametrize("spelling", ["sqlite:///{}", "sqlite+pysqlite:///{}?timeout=30"])
def test_a_store_that_is_read_only_is_read_and_takes_no_run(spelling, store, monkeypatch, capfd):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", spelling.format(store / "mlflow.db"))
    with start_run("a run", {"stage": "data"}) as run:
        pass
    monkeypatch.setattr(os, "access", lambda _, mode: mode != os.W_OK)  # root may write anything
    assert open_run(run.run_id).status == "FINISHED"
    assert main(["data", "--config", "demo", "--images_per_class", "16"]) == 2
    assert capfd.readouterr().err.endswith(": the file is write-protected\n")
    assert len(mlflow.search_runs()) == 1


def test_what_mlflow_says_of_a_request_is_shown_without_the_password(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    says = "API request to http://lab:{}@host/api failed"
    assert _complain(MlflowException(says.format("s3cret")), 1) == 1
    assert capsys.readouterr().err == f"error: {says.format('***')}\n"
    log = tmp_path / "0.log"
    log.write_text(says.format("s3cret"))
    assert tail_of(log) == says.format("***")


def test_one_store_has_one_lock_however_it_is_spelled(tmp_path, monkeypatch):
    """Else two processes make its tables at once, and one fails."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    spellings = ["folder/m.db", "link/m.db", "./folder/m.db?timeout=30", f"{tmp_path}/link/m.db"]
    spellings.append("file:link/m.db?uri=true")
    assert len({one_store(f"sqlite:///{spelling}") for spelling in spellings}) == 1
    assert one_store("http://host:5000") == "http://host:5000"


@pytest.mark.parametrize(
    ("given", "anywhere"),
    [
        ("sqlite:///m.db", "sqlite:///{}/m.db"),
        ("sqlite+pysqlite:///m.db?timeout=9", "sqlite+pysqlite:///{}/m.db?timeout=9"),
        ("sqlite:///file:m.db?mode=rw&uri=true", "sqlite:///file:{}/m.db?mode=rw&uri=true"),
        ("http://lab:pass@host:5000", "http://lab:pass@host:5000"),
    ],
)
def test_an_address_reads_the_same_in_any_folder(tmp_path, monkeypatch, given, anywhere):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", given)
    assert make_url(store_address()) == make_url(anywhere.format(tmp_path))
    assert is_file_of_this_host(given) is given.startswith("sqlite")


def test_a_registry_that_is_away_keeps_no_expert_waiting(away, store, monkeypatch, caplog):
    run = Run("0" * 32)
    monkeypatch.setattr(TEN_TRIES, lambda _: pytest.fail("MLflow asked it as well"))
    monkeypatch.setattr(mlflow, "get_registry_uri", lambda: f"postgresql+psycopg://{away}/x")
    register(run, "a-name")
    (record,) = caplog.records
    assert "register_as=a-name: not registered (" in record.message
    assert "refused" in record.message
