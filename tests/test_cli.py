"""Bad input: one line of ours, exit code 2, no store touched."""

import gc
import io
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from longtail_experts import cli
from longtail_experts.cli import main
from longtail_experts.data import sources

FULL = ("main", "--config", "cifar100_lt")


@pytest.fixture
def empty_folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LONGTAIL_CACHE_DIR", str(tmp_path / ".cache"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((*FULL, "--epoch", "2"), "unknown field 'epoch'; did you mean epochs?"),
        ((*FULL, "--epochs", "abc"), "epochs=abc: "),
        ((*FULL, "--lr", "-1"), "lr=-1: "),
        ((*FULL, "--lr", "-1e-3"), "lr=-1e-3: "),
        ((*FULL, "--lr=nan"), "lr=nan: "),
        ((*FULL, "--imbalance_factor", "0.5"), "imbalance_factor=0.5: "),
        ((*FULL, "--milestones", "5,3"), "milestones=5,3: must be positive epochs in increasing"),
        ((*FULL, "--loss", "logitadjust"), "did you mean logit_adjust?"),
        ((*FULL, "--loss", "all", "--expert_seed", "1"), "expert_seed=1: with loss=all"),
        ((*FULL, "--device", "cuda"), "device=cuda: torch sees no GPU"),
        (("main", "--config", "nosuch"), "config=nosuch: no such file"),
        (("main", "--config", "cifar_lt"), "did you mean cifar100_lt?"),
        (("main", "--config", "broken.yaml"), "config=broken.yaml: "),
        (("main", "--config", "unknown.yaml"), "unknown field 'epoch'; did you mean epochs?"),
        ((*FULL, "--data_dir", "empty"), "data_dir=empty: "),
        ((*FULL, "--data_dir", "none"), "data_dir=none: source=cifar100 needs a folder"),
        ((*FULL, "--data_dir", "corrupt"), "not a parquet file"),
        (("main", "--data_dir", "empty"), "data_dir=empty: "),
        (("main", "--data_dir", "x" * 300), "File name too long"),
        (("main", "--data_dir", ""), "data_dir="),
        (("main", "--source", "images", "--data_dir", "two\nlines"), "two lines"),
        (("calibrate", "--run_id", "x", "--device", "cuda"), "device=cuda: torch sees no GPU"),
        (("train", "--config", "demo", "--loss", "all"), "loss=all: train takes one loss"),
        (("trian",), "no entry point 'trian'; did you mean train?"),
        (("data", "--resume", "x"), "unknown field 'resume'"),
        (("calibrate",), "--run_id"),
        (("calibrate", "--run_id", "x", "--lr", "1"), "unknown field 'lr'"),
        (("calibrate", "--run_id", "x", "--batch_size", "0"), "batch_size=0: "),
        (("export", "--run_ids", ",", "--out", "o"), "run_ids=','"),
        ((*FULL, "--epochs", "9" * 10_000), "epochs=999"),
        ((*FULL, "stray"), "'stray': fields are given as --name value"),
        (("main", "-lr", "3"), "'-lr': fields are given as --name value"),
        (("main", "epochs=3"), "'epochs=3': fields are given as --name value"),
    ],
)
def test_bad_input_is_one_line(empty_folder, capfd, monkeypatch, arguments, says):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (empty_folder / "empty").mkdir()
    (empty_folder / "corrupt").mkdir()
    for name in ("train.parquet", "test.parquet"):
        (empty_folder / "corrupt" / name).write_bytes(b"not parquet")
    (empty_folder / "broken.yaml").write_text("lr: [0.1")
    (empty_folder / "unknown.yaml").write_text("epoch: 3")
    before = sorted(empty_folder.rglob("*"))
    assert main(list(arguments)) == 2
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert says in line
    assert len(line) < 600
    assert sorted(empty_folder.rglob("*")) == before


def test_help_teaches_every_field(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["main", "--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    for name, field in cli.Config.model_fields.items():
        assert f"--{name}" in text
        assert field.description


@pytest.fixture
def chosen(monkeypatch):
    """Run main up to the point where a stage would start; the config that it would get."""
    calls = []
    monkeypatch.setattr(cli, "_on_config", lambda entry, config: calls.append(config) or 0)
    return calls


def test_without_cifar100_the_demo_is_announced_at_start_and_end(empty_folder, chosen, capsys):
    assert main(["main", "--loss", "logit_adjust", "--epochs", "1"]) == 0
    assert (chosen[0].source, chosen[0].epochs, chosen[0].loss) == ("synthetic", 1, "logit_adjust")
    assert capsys.readouterr().out.count("DEMO") == 2


@pytest.mark.parametrize("files", [["data/cifar-100-python.tar.gz"], ["data/train-0.parquet"]])
def test_with_cifar100_on_disk_the_full_recipe_runs(empty_folder, chosen, capsys, files):
    (empty_folder / "data").mkdir()
    for file in files:
        (empty_folder / file).touch()
    assert main(["main"]) == 0
    assert (chosen[0].source, chosen[0].epochs) == ("cifar100", 256)
    assert "DEMO" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "named",
    [
        ["--config", "cifar100_lt"],
        ["--source", "synthetic"],
        ["--data_dir", "elsewhere"],
        ["--subset_rule", "ldam"],
    ],
)
def test_naming_anything_switches_the_fallback_off(empty_folder, chosen, capsys, named):
    assert main(["main", *named]) == 0
    assert chosen[0].epochs == 256
    assert "DEMO" not in capsys.readouterr().out


def test_a_folder_that_may_not_be_looked_into_is_named(empty_folder, monkeypatch, capsys):
    def refuse(folder: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(sources, "cifar100_on_disk", refuse)
    assert main(["main"]) == 2
    assert capsys.readouterr().err.strip() == "error: data_dir=data: Permission denied"


def test_an_unknown_field_is_never_called_by_its_own_name(empty_folder, capsys):
    assert main(["preflight", "--resume", "x"]) == 2
    assert "did you mean resume" not in capsys.readouterr().err


def test_milestones_past_the_end_are_a_warning(empty_folder, monkeypatch, caplog):
    from longtail_experts.stages import inputs

    def stop(config):
        raise cli.ConfigError("far enough")

    monkeypatch.setattr(inputs, "resolve", stop)
    assert main(["train", *FULL[1:], "--epochs", "100"]) == 2
    assert "milestones=[192, 224] lie at or past epochs=100" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("main", "--epoch", "2"), "unknown field 'epoch'; did you mean epochs?"),
        ((*FULL, "--data_dir", "em[p]ty"), r"data_dir=em\[p\]ty: "),
        (("calibrate", "--run_id", "nosuch"), "run_id=nosuch: not found in the store"),
        (("compare", "--run_ids", "nosuch"), "run_id=nosuch: not found in the store"),
    ],
)
def test_what_is_refused_under_mlflow_run_is_said_on_the_launchers_run(
    store, monkeypatch, arguments, says
):
    import mlflow

    client = mlflow.MlflowClient()
    launched = client.create_run(client.create_experiment("launcher"), run_name="mine").info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", launched)
    assert main(list(arguments)) == 2
    run = client.get_run(launched)
    assert run.data.tags["mlflow.note.content"].startswith(f"**Not started.** {says}")
    assert run.data.tags["stage"] == "refused"
    assert (run.info.status, run.info.run_name) == ("RUNNING", "mine")  # the launcher ends it


def test_a_page_that_says_something_is_left_alone(store, monkeypatch):
    import mlflow

    client = mlflow.MlflowClient()
    tags = {"mlflow.note.content": "## ce: 38 %", "stage": "main"}
    launched = client.create_run(client.create_experiment("launcher"), tags=tags).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", launched)
    assert main(["main", "--epoch", "2"]) == 2
    assert tags.items() <= client.get_run(launched).data.tags.items()


@pytest.mark.parametrize(
    ("arguments", "warns"),
    [
        (("train", "--epochs", "1"), True),
        (("main", "--epochs", "1", "--preflight", "false"), True),
        (("main", "--epochs", "1"), False),  # preflight says so
        (("train", "--epochs", "1", "--lr_schedule", "cosine"), False),
        (("data", "--epochs", "1"), False),
    ],
)
def test_milestones_that_will_not_act_are_named_where_they_were_to(
    empty_folder, caplog, arguments, warns
):
    (empty_folder / "empty").mkdir()
    assert main([*arguments, "--config", "cifar100_lt", "--data_dir", "empty"]) == 2
    assert ("will not act" in caplog.text) is warns


def test_a_store_that_is_away_does_not_hide_the_refusal(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/no/such/folder.db")
    monkeypatch.setenv("MLFLOW_RUN_ID", "1" * 32)
    assert main(["main", "--epoch", "2"]) == 2
    assert "error: unknown field 'epoch'" in capfd.readouterr().err


def test_names_of_levels_are_left_as_others_know_them(capsys):
    """PyTorch, for one, puts them in front of its own warnings."""
    assert main(["main", "--epoch", "2"]) == 2
    assert logging.getLevelName(logging.WARNING) == "WARNING"


def test_a_launched_run_that_the_store_does_not_know_is_one_line(store, monkeypatch, capfd):
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)
    assert main(["main", "--config", "demo"]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: MLFLOW_RUN_ID: run_id=000")


@pytest.mark.parametrize(("offline", "telemetry"), [("1", "true"), ("0", None)])
def test_offline_is_mlflows_telemetry_too(offline, telemetry, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LONGTAIL_OFFLINE", offline)
    monkeypatch.delenv("MLFLOW_DISABLE_TELEMETRY")
    assert main(["data", "--source", "nonsense"]) == 2
    assert os.environ.get("MLFLOW_DISABLE_TELEMETRY") == telemetry


def test_a_stream_without_a_reader_takes_what_is_written(tmp_path):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stream:
        for _ in range(3):
            print("x" * 100_000, file=cli._Lasting(stream), flush=True)


def test_what_a_stream_cannot_show_is_spelled_out():
    content = io.BytesIO()
    stream = io.TextIOWrapper(content, "ascii")
    print("\u2611 \u00b1", file=cli._Lasting(stream), flush=True)
    assert content.getvalue() == b"\\u2611 \\xb1\n"


def test_no_password_is_written_by_whoever_writes_an_address():
    """MLflow links to the runs of a server."""
    stream = io.StringIO()
    print("View run at: http://lab:s3cret@host/#/runs/1", file=cli._Lasting(stream))
    assert stream.getvalue() == "View run at: http://lab:***@host/#/runs/1\n"


def test_a_command_whose_output_nobody_reads_ends_as_it_would(monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stream:
        monkeypatch.setattr("sys.stdout", stream)
        with pytest.raises(SystemExit) as ended:
            main(["--help"])
        assert ended.value.code == 0


def test_a_command_without_streams_ends_as_it_would(monkeypatch):
    monkeypatch.setattr("sys.stderr", None)
    assert main(["main", "--epoch", "2"]) == 2


ENDS = """
import atexit, runpy, sys
from longtail_experts import cli

class Imported:
    def __del__(self):
        print("taken apart")

imported = Imported()

def main(arguments):
    atexit.register(print, "what others have to do at the end")
    print("done")
    {ends}

cli.main = main
runpy.run_module("longtail_experts", run_name="__main__")
"""


@pytest.mark.parametrize(
    ("ends", "code", "also"),
    [
        ("return 0", 0, []),
        ("return 130", 130, []),
        ("sys.exit(2)", 2, ["taken apart"]),
        ("raise OSError", 1, ["taken apart"]),
    ],
)
def test_a_process_ends_at_once_when_main_has_returned(ends, code, also):
    """And as others do where it has not. Its output is a pipe, which is written to at the end."""
    command = [sys.executable, "-c", ENDS.format(ends=ends)]
    ended = subprocess.run(command, check=False, capture_output=True, text=True)
    assert ended.returncode == code
    assert ended.stdout.splitlines() == ["done", "what others have to do at the end", *also]


def test_what_is_imported_is_not_looked_through_for_garbage(tmp_path, monkeypatch):
    tmp_path.joinpath("one_more.py").write_text("import gc\nCOLLECTED = gc.isenabled()\n")
    monkeypatch.syspath_prepend(tmp_path)
    frozen = []
    for _ in range(2):
        with cli._importing():
            import one_more
        assert gc.isenabled()
        assert not one_more.COLLECTED
        frozen.append(gc.get_freeze_count())
        gc.unfreeze()
    assert frozen[0] > 0 == frozen[1]  # nothing came the second time
