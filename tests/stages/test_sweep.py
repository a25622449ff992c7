"""A grid of experts: what it means, what is not repeated, and what failures and kills leave."""

import json
import math
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import mlflow
import psutil
import pytest
import quick_trials
import yaml
from conftest import OTHER, arguments_of, use_store
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from reliability.harness import Training, journal_lines, wait_until

from longtail_experts.cli import main
from longtail_experts.config import CHANGES_NO_FIGURE, Config, ConfigError, load_config
from longtail_experts.stages import sweep as sweep_stage
from longtail_experts.stages.grid import MOST_TRIALS, points_of, read_sweep
from longtail_experts.tracking import sweeps
from longtail_experts.tracking.recorder import local_folder
from longtail_experts.tracking.report import SIGNATURE
from longtail_experts.tracking.runs import one_process, start_run
from longtail_experts.tracking.stores import one_store, store_address
from longtail_experts.tracking.sweeps import Trial

LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
os.environ[LOOPBACK] = "0"  # Ray's name for: no other device than the loopback one
needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed")
CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "sweeps"


def write(folder: Path, **content) -> str:
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump({"config": "cifar100_lt", **content}, sort_keys=False))
    return str(path)


# --- the grid ---------------------------------------------------------------------------------


def test_trials_are_the_product_of_the_grid(tmp_path):
    grid = {"loss": ["ce", "logit_adjust"], "tau": [0, 1.5], "milestones": [[3, 5], "none"]}
    file = write(tmp_path, fixed={"epochs": 7, "lr": 0.1}, grid=grid)
    points = points_of(read_sweep(file, {"lr": "0.3"}))
    found = [(p.config.loss, p.config.tau, p.config.milestones) for p in points]
    losses = [("ce", 1.0), ("logit_adjust", 0), ("logit_adjust", 1.5)]  # ce has no tau
    assert found == [(*loss, m) for loss, m in product(losses, [(3, 5), ()])]
    assert {(p.config.epochs, p.config.lr) for p in points} == {(7, 0.3)}
    assert points[-1].fields == {"loss": "logit_adjust", "tau": "1.5", "milestones": "none"}


@pytest.mark.parametrize(
    ("grid", "trials"),
    [
        ({"loss": ["focal", "ldam_drw"], "gamma": [1, 2], "beta": [0.9, 0.99]}, 4),
        ({"imbalance_profile": ["natural", "exp"], "imbalance_factor": [10, 50, 100]}, 4),
        ({"lr_schedule": ["cosine", "milestones"], "lr_decay": [0.1, 0.5]}, 3),
    ],
)
def test_what_a_training_does_not_look_at_trains_nothing_twice(tmp_path, grid, trials):
    assert len(points_of(read_sweep(write(tmp_path, grid=grid), {}))) == trials


def test_none_is_what_it_is_on_a_command_line(tmp_path):
    given = {"grid": {"seed": [0]}, "trials_at_once": "none", "gpus_per_trial": "none"}
    sweep = read_sweep(write(tmp_path, **given), {})
    assert (sweep.trials_at_once, sweep.gpus_per_trial) == (None, None)


def test_a_grid_may_vary_the_recipe(tmp_path):
    file = write(tmp_path, fixed={"lr": 0.2}, grid={"config": ["demo", "cifar100_lt"]})
    points = points_of(read_sweep(file, {}))
    assert [p.config.source for p in points] == ["synthetic", "cifar100"]
    assert [p.config.lr for p in points] == [0.2, 0.2]
    assert [p.label for p in points] == ["config=demo", "config=cifar100_lt"]


@pytest.mark.parametrize(
    ("content", "overrides", "says"),
    [
        ({"grid": {"sed": [0]}}, {}, "unknown field 'sed'; did you mean seed?"),
        ({"grid": {"seed": [0]}, "fixd": {}}, {}, "unknown field 'fixd'; did you mean fixed?"),
        ({"grid": {"seed": [0]}, "lr": 1}, {}, "'lr'; a field of the config goes under `fixed:`"),
        ({"grid": {"seed": [0, "x"]}}, {}, "seed=x: "),
        ({"grid": {"lr": [0.1, -1]}}, {}, "lr=-1: "),
        ({"grid": {"loss": ["ce", "all"]}}, {}, "loss=all: a trial is one expert"),
        ({"grid": {"seed": [0]}, "fixed": {"loss": "all"}}, {}, "loss=all: a trial is one"),
        ({"grid": {"seed": [0, 1, 0]}}, {}, "two trials are the same (seed=0; seed=0)"),
        ({"grid": {"lr": [1, 1.0]}}, {}, "two trials are the same (lr=1; lr=1)"),
        ({"grid": {"device": ["cpu", "auto"]}}, {}, "two trials are the same"),
        ({"grid": {"seed": []}}, {}, "seed=[]: give at least one value"),
        ({"grid": {}}, {}, "grid={}: give a field"),
        ({}, {}, "grid: is missing"),
        ({"grid": {"seed": 3}}, {}, "seed=3: give a list of values"),
        ({"grid": ["seed"]}, {}, "grid: must hold `name: [value, value]` lines"),
        ({"grid": {"seed": [[[1]]]}}, {}, "grid: must hold `name: [value, value]` lines"),
        ({"grid": {"seed": [0]}, "fixed": {"seed": 1}}, {}, "seed: is both under `fixed:`"),
        ({"grid": {"seed": [0]}}, {"seed": "1"}, "seed=1: the grid of"),
        ({"grid": {"seed": [0]}, "trials_at_once": 0}, {}, "trials_at_once=0: "),
        ({"grid": {"seed": [0]}, "cpus_per_trial": True}, {}, "cpus_per_trial=true: "),
        ({"grid": {"seed": [0]}, "gpus_per_trial": -1}, {}, "gpus_per_trial=-1: "),
        ({"grid": {"seed": [0]}, "gpus_per_trial": 1.5}, {}, "gpus_per_trial=1.5: must be whole"),
        ({"grid": {"seed": [0]}, "config": "nosuch"}, {}, "config=nosuch: no such file"),
        ({"grid": {"seed": [0, 1]}, "fixed": {"expert_seed": 5}}, {}, "seed: acts through expert"),
        (
            {"grid": {"split_seed": [0, 1]}, "config": "literature"},
            {},
            "grid: split_seed: subset_rule=ldam has the same training images",
        ),
        (
            {"grid": {"seed": list(range(101)), "split_seed": list(range(100))}},
            {},
            "grid: 10,100 trials; at most 10,000",
        ),
    ],
)
def test_a_wrong_sweep_is_refused_in_one_line(
    tmp_path, monkeypatch, capfd, content, overrides, says
):
    monkeypatch.chdir(tmp_path)
    file = write(tmp_path, **content)
    before = sorted(tmp_path.rglob("*"))
    assert main(["sweep", "--sweep", file, *arguments_of(overrides)]) == 2
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert says in line
    assert len(line) < 600
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("within", ["grid: {seed: [0], seed: [1]}", "fixed: {lr: 1, lr: 2}"])
def test_what_is_given_twice_is_refused_however_deep(tmp_path, within):
    (tmp_path / "sweep.yaml").write_text(f"config: demo\n{within}\n")
    with pytest.raises(ConfigError, match=r": (grid: seed|fixed: lr): given 2 times$"):
        read_sweep(str(tmp_path / "sweep.yaml"), {})


def test_a_grid_that_prints_as_gigabytes_is_refused(tmp_path):
    bomb = "a: &a [x,x,x,x,x,x,x,x,x]\n"
    for here, there in zip("bcdefghij", "abcdefghi", strict=True):
        bomb += f"{here}: &{here} [{','.join([f'*{there}'] * 9)}]\n"
    (tmp_path / "bomb.yaml").write_text(bomb.replace("a: &a", "config: &a") + "grid: {seed: *j}\n")
    with pytest.raises(ConfigError) as error:
        read_sweep(str(tmp_path / "bomb.yaml"), {})
    assert len(str(error.value)) < 600


def test_as_many_trials_as_allowed_are_made(tmp_path):
    grid = {"seed": list(range(100)), "split_seed": list(range(MOST_TRIALS // 100))}
    assert len(points_of(read_sweep(write(tmp_path, grid=grid), {}))) == MOST_TRIALS


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_sweeps_that_come_with_the_project(path):
    assert path.read_text().startswith("# ")
    sweep = read_sweep(path.stem, {})
    points = points_of(sweep)
    assert len(points) == math.prod(map(len, sweep.grid.values()))
    if path.stem == "tau_family":
        taus = [point.config.tau for point in points]
        assert sum(taus) / len(taus) == 1


@pytest.mark.parametrize("name", list(Config.model_fields))
def test_the_hash_of_a_config_is_of_what_changes_figures(name):
    config = Config().replace(warmup_steps=0)  # what warmup_epochs needs
    is_same = config.replace(**{name: OTHER[name]}).sha256 == config.sha256
    assert is_same == (name in CHANGES_NO_FIGURE)


# --- real sweeps on this machine --------------------------------------------------------------


def fields_of(tiny_arguments) -> dict[str, str]:
    pairs = zip(tiny_arguments[::2], tiny_arguments[1::2], strict=True)
    fields = {name.removeprefix("--"): value for name, value in pairs}
    del fields["config"]
    return fields


def trials_of(parent: str) -> dict[tuple[str, ...], dict]:
    uri = MlflowClient().get_run(parent).info.artifact_uri
    path = Path(uri.removeprefix("file://")) / "trials.json"
    return {tuple(trial["fields"].values()): trial for trial in json.loads(path.read_text())}


def runs(stage: str) -> list:
    found = mlflow.get_experiment_by_name("tests")
    if found is None:
        return []
    every = MlflowClient().search_runs([found.experiment_id], max_results=1000)
    return [run for run in every if run.data.tags.get("stage") == stage]


BRIEF = {"weight_decay": 0.5, "epochs": 2, "lr": 0.01}


def logits_of(run) -> dict[str, bytes]:
    folder = Path(run.info.artifact_uri.removeprefix("file://")) / "logits"
    return {path.name: path.read_bytes() for path in folder.glob("*.npz")}


def use_quick_trials(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(sweep_stage, "run_trial", quick_trials.quick_trial)
    here = str(Path(quick_trials.__file__).parent)
    patch.setenv("PYTHONPATH", here, prepend=os.pathsep)  # Ray's workers look there


@pytest.fixture(scope="module")
def swept(tmp_path_factory, migrated_database, tiny_arguments) -> dict:
    """Two losses, each at a rate that works and at one that diverges, swept once."""
    folder = tmp_path_factory.mktemp("swept")
    fixed = {**fields_of(tiny_arguments), **BRIEF, "preflight": False}
    del fixed["lr"]
    file = write(folder, fixed=fixed, grid={"lr": [100, 0.01], "loss": ["ce", "logit_adjust"]})
    with pytest.MonkeyPatch.context() as patch:
        use_store(folder, migrated_database, patch)
        use_quick_trials(patch)
        code = main(["sweep", "--sweep", file])
        (parent,) = runs("sweep")
        return {"folder": folder, "file": file, "code": code, "parent": parent.info.run_id}


@pytest.fixture
def swept_store(swept, monkeypatch) -> dict:
    monkeypatch.chdir(swept["folder"])
    use_quick_trials(monkeypatch)
    database = swept["folder"] / "mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{database}")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "tests")
    monkeypatch.setenv("LONGTAIL_CACHE_DIR", str(swept["folder"] / ".cache"))
    mlflow.tracking.fluent._active_experiment_id = None
    return swept


@needs_ray
def test_a_failing_trial_is_tried_twice_and_stops_no_other(swept_store):
    parent = MlflowClient().get_run(swept_store["parent"])
    assert (swept_store["code"], parent.info.status) == (1, "FAILED")
    full_recipe = load_config("cifar100_lt", {})
    assert json.loads(parent.data.tags["recipe_epochs"]) == {"experts": full_recipe.epochs}
    trials = trials_of(swept_store["parent"])
    states = {fields: trial["state"] for fields, trial in trials.items()}
    assert states == {
        ("100", "ce"): "failed",
        ("100", "logit_adjust"): "failed",
        ("0.01", "ce"): "finished",
        ("0.01", "logit_adjust"): "finished",
    }
    children = {run.info.run_id: run for run in runs("main")}
    assert len(children) == 4
    for trial in trials.values():
        child = children[trial["run_id"]]
        assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert child.data.tags["config_sha256"] == trial["config_sha256"]
        assert child.data.params["splits_sha256"] == trial["splits_sha256"]
        is_good = trial["state"] == "finished"
        assert child.info.status == ("FINISHED" if is_good else "FAILED")
        assert child.data.tags.get("resumed") == (None if is_good else "1")
        assert is_good or "not finite" in trial["reason"]
        assert trial["run_id"] in parent.data.tags["mlflow.note.content"]


@needs_ray
def test_only_of_trials_that_failed_a_log_stays(swept_store):
    kept = sorted(local_folder(swept_store["parent"]).iterdir())
    assert [file.name for file in kept] == ["00000.log", "00001.log"]
    for log in kept:
        assert stat.S_IMODE(log.stat().st_mode) == 0o600
        assert "error: loss is not finite" in log.read_text()
        assert "Traceback" not in log.read_text()


@needs_ray
def test_a_trial_is_an_ordinary_expert(swept_store, tiny_arguments):
    """Bit for bit that of `main`, though its process has trained others before."""
    arguments = [*tiny_arguments, *arguments_of(BRIEF)]
    assert main(["main", "--loss", "logit_adjust", *arguments]) == 0
    run_id = trials_of(swept_store["parent"])["0.01", "logit_adjust"]["run_id"]
    trial = MlflowClient().get_run(run_id)
    (alone,) = (run for run in runs("main") if "mlflow.parentRunId" not in run.data.tags)
    assert logits_of(alone) == logits_of(trial)
    assert len(logits_of(alone)) == 7
    for name in ("config_sha256", "code_sha256"):
        assert alone.data.tags[name] == trial.data.tags[name]
    MlflowClient().delete_run(alone.info.run_id)


@needs_ray
@pytest.mark.slow
def test_the_same_command_repeats_only_what_failed(swept_store, capfd):
    before = trials_of(swept_store["parent"])
    assert main(["sweep", "--sweep", swept_store["file"]]) == 1
    assert [run.info.run_id for run in runs("sweep")] == [swept_store["parent"]]
    after = trials_of(swept_store["parent"])
    assert "2 of 4 trials failed twice: lr=100 loss=ce: " in capfd.readouterr().err
    for fields, trial in after.items():
        same_run = trial["run_id"] == before[fields]["run_id"]
        assert same_run == (trial["state"] == "finished")  # the second attempt began afresh


@needs_ray
def test_two_processes_do_not_run_one_sweep(swept_store, capfd):
    parent = MlflowClient().get_run(swept_store["parent"])
    here = one_store(store_address())  # experiment 0 is in every store
    this = f"sweep {here} {parent.info.experiment_id} {parent.data.tags['sweep_sha256']}"
    with one_process(this, "not here"):
        assert main(["sweep", "--sweep", swept_store["file"]]) == 1
    assert "error: another process is at this sweep already" in capfd.readouterr().err
    assert len(runs("sweep")) == 1


@needs_ray
def test_another_sweep_finds_what_is_finished(swept_store, tiny_arguments, capfd, monkeypatch):
    """No trial is started, so Ray is not either; and a second time nothing at all happens."""
    monkeypatch.setattr("ray.init", lambda *_, **__: pytest.fail("Ray was started"))
    fixed = {**fields_of(tiny_arguments), **BRIEF}
    folder = swept_store["folder"] / "other"
    folder.mkdir()
    file = write(folder, fixed=fixed, grid={"loss": ["logit_adjust", "ce"]})
    num_children = len(runs("main"))
    assert main(["sweep", "--sweep", file]) == 0
    (parent,) = (run for run in runs("sweep") if run.info.run_id != swept_store["parent"])
    assert parent.info.status == "FINISHED"
    theirs = trials_of(swept_store["parent"])
    for (loss,), trial in trials_of(parent.info.run_id).items():
        assert trial["state"] == "found"
        assert trial["run_id"] == theirs["0.01", loss]["run_id"]
    assert len(runs("main")) == num_children
    assert main(["sweep", "--sweep", file]) == 0
    assert "nothing was changed" in capfd.readouterr().out
    assert main(["sweep", "--sweep", file, "--register_as", "found"]) == 0
    out = capfd.readouterr().out
    assert "registered as found: version 2" in out
    assert "nothing else was changed" in out
    assert len(runs("sweep")) == 2


@needs_ray
def test_other_code_repeats_every_trial(swept_store, monkeypatch):
    from longtail_experts.tracking import sweeps

    experiment = mlflow.get_experiment_by_name("tests").experiment_id
    assert len(sweeps.finished_experts(experiment)) == 2
    monkeypatch.setattr(sweeps, "code_sha256", lambda: "0" * 64)
    assert not sweeps.finished_experts(experiment)


def test_without_ray_one_line_says_what_to_install(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("longtail_experts.stages.sweep.find_spec", lambda name: None)
    assert main(["sweep", "--sweep", "demo"]) == 2
    assert 'pip install -e ".[sweep]"' in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


@needs_ray
@pytest.mark.parametrize("is_heard", [False, True])
def test_an_address_where_no_cluster_answers(store, capfd, monkeypatch, is_heard):
    def init(**_):
        assert is_heard, "Ray is not asked, which would try for a quarter of an hour"
        raise ConnectionError("no cluster")

    monkeypatch.setattr("ray.init", init)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        if is_heard:
            other.listen()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        assert main(["sweep", "--sweep", "demo", "--address", address]) == 2
    says = "no cluster" if is_heard else "Connection refused"
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith(f"error: address={address}: no Ray cluster answers there (")
    assert says in line
    assert not runs("sweep")


# --- killed -----------------------------------------------------------------------------------


def is_training(folder: Path, number: int) -> bool:
    """Whether `number` trials below `folder` have recorded points on this disk."""
    journals = folder.glob(".cache/runs/*/points.jsonl")
    return sum(b"\n" in path.read_bytes() for path in journals) >= number


def has_ended(sweep: Training) -> bool:
    return sweep.process.exitcode is not None


def started_sweep(folder: Path, arguments: list[str]) -> Training:
    """Once both trials have trained for a while."""
    before, sweep = journal_lines(folder), Training(folder, arguments)

    def is_under_way() -> bool:
        return is_training(folder, 2) and journal_lines(folder) > before + 20

    wait_until(lambda: is_under_way() or has_ended(sweep), what="both trials train")
    return sweep


@needs_ray
@pytest.mark.slow
def test_a_sweep_cut_off_goes_on_where_it_was(store, tiny_arguments):
    fixed = {**fields_of(tiny_arguments), "epochs": 60, "preflight": False}
    arguments = ["sweep", "--sweep", write(store, fixed=fixed, grid={"seed": [0, 1]})]

    for number, code in ((signal.SIGINT, 130), (signal.SIGHUP, 143)):
        sweep = started_sweep(store, arguments)
        if number == signal.SIGHUP:  # a terminal that is gone says so to all that it has started
            for process in psutil.Process(sweep.process.pid).children(recursive=True):
                process.send_signal(number)
        sweep.kill(number)
        assert sweep.wait() == code, sweep.output
        (parent,) = runs("sweep")
        assert parent.info.status == "KILLED"
        children = {run.info.run_id for run in runs("main")}
        assert {run.info.status for run in runs("main")} == {"KILLED"}
        assert {t["state"] for t in trials_of(parent.info.run_id).values()} == {"stopped"}
        assert len(list(store.glob(".cache/runs/*/last.pt"))) == 2

    sweep = started_sweep(store, arguments)
    sweep.kill(signal.SIGKILL)
    assert sweep.wait() == -9, sweep.output
    assert {run.info.status for run in runs("main")} == {"RUNNING"}

    sweep = Training(store, arguments)
    assert sweep.wait() == 0, sweep.output
    assert [run.info.run_id for run in runs("sweep")] == [parent.info.run_id]
    assert {run.info.run_id: run.info.status for run in runs("main")} == dict.fromkeys(
        children, "FINISHED"
    )
    assert {run.data.tags["resumed"] for run in runs("main")} == {"3"}
    trials = trials_of(parent.info.run_id).values()
    assert {trial["run_id"] for trial in trials} == children


def test_what_a_sweep_finds_finished_is_registered_where_that_is_asked_for(experts_copy):
    config = load_config("cifar100_lt", {"register_as": "experts"})
    found = [experts_copy["ce"], experts_copy["logit_adjust"]]
    jobs = [
        sweep_stage.Job(config, Trial({}, ("config", "splits"), "found", run_id), "0.log")
        for run_id in [*found, None]
    ]
    sweep_stage.register_finished(jobs)
    versions = MlflowClient().search_model_versions("name = 'experts'")
    assert {version.run_id for version in versions} == set(found)


def test_what_auto_means_is_not_what_another_trial_says():
    config = load_config("cifar100_lt", {"device": "cpu"})
    assert {sweep_stage.what_auto_means(config.replace(precision=p)) for p in ("fp32", "bf16")} == {
        sweep_stage.what_auto_means(config)
    }


def test_a_page_of_many_trials_is_what_mlflow_keeps(store):
    metrics = {f"test_balanced/{n}_accuracy": 0.5 for n in ("balanced", "head", "tail")}
    trials = [
        Trial({"seed": str(n), "loss": "ce"}, ("c", "s"), "finished", "0" * 32, metrics=metrics)
        for n in range(60)
    ]
    with start_run("a sweep", {"stage": "sweep"}) as run:
        for _ in range(2):
            sweeps.record_trials(run, trials)
    page = run.tags["mlflow.note.content"]
    assert "The other trials are in report.md." in page
    assert "On test_balanced, in percent" in page
    assert SIGNATURE.search(page)
    assert not MlflowClient().list_artifacts(run.run_id, "notes")


@pytest.mark.parametrize("error", [KeyboardInterrupt, MlflowException])
def test_trials_under_way_are_stopped_while_the_store_is_away(store, monkeypatch, capfd, error):
    """Then not even the page can be looked at, and nobody says what became of the trials."""
    cancelled = []
    monkeypatch.setattr("ray.remote", lambda **_: lambda _: SimpleNamespace(remote=lambda _: "ref"))
    monkeypatch.setattr("ray.wait", lambda refs, **_: ([], refs))
    monkeypatch.setattr("ray.cancel", cancelled.append)
    monkeypatch.setenv("LONGTAIL_STORE_PATIENCE", "1")
    plan = read_sweep(write(store, grid={"seed": [0]}), {})
    (point,) = points_of(plan)
    job = sweep_stage.Job(point.config, Trial(point.fields, ("config", "splits")), "0.log")

    def away(*_: object, **__: object) -> None:
        raise MlflowException("API request to /runs/search failed with exception: refused")

    def interrupted(_: object) -> None:
        monkeypatch.setattr(MlflowClient, "search_runs", away)
        raise error("while the tracking store does not answer")

    monkeypatch.setattr(sweep_stage.Page, "show", interrupted)
    with start_run("a sweep", {"stage": "sweep"}) as parent, pytest.raises(error) as raised:
        sweep_stage.drive(parent, [job], [job], plan, 0.0)
    assert cancelled == ["ref"]
    assert "stopping 1 trials" in capfd.readouterr().err
    assert (sweep_stage.GOES_ON in str(raised.value)) == (error is KeyboardInterrupt)


# --- a cluster --------------------------------------------------------------------------------


# `ray start` puts the host's address in place of the loopback one, and listens on all devices.
LOOPBACK_RAY = """
from ray._private import services
services.resolve_ip_for_localhost = lambda host: host
from ray.scripts.scripts import main
main()
"""


@contextmanager
def ray_node(name: str, *options: str, **environment: str) -> Iterator[subprocess.Popen]:
    """One node with one core on 127.0.0.1; ended with everything that it started."""
    place = tempfile.mkdtemp(prefix=f"ray{name}", dir="/tmp")  # sockets need a short path
    command = [
        *(sys.executable, "-c", LOOPBACK_RAY, "start", "--block", "--num-cpus=1"),
        *("--node-ip-address=127.0.0.1", "--disable-usage-stats", "--num-gpus=0"),
        *("--object-store-memory=100000000", f"--temp-dir={place}", *options),
    ]
    log = Path(place) / "start.log"
    environment = {**os.environ, "RAY_raylet_start_wait_time_s": "180", **environment}
    del environment[LOOPBACK]  # with it, no second node may join
    with log.open("wb") as output:
        node = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
    try:
        wait_until(
            lambda: b"runtime started" in log.read_bytes() or node.poll() is not None, what="a node"
        )
        assert node.poll() is None, log.read_text()
        yield node
    finally:
        kill_with_children(node)
        shutil.rmtree(place, ignore_errors=True)


def kill_with_children(node: subprocess.Popen) -> None:
    """SIGKILL to a node's raylet, its workers, and all else that it started."""
    if node.poll() is None:
        family = psutil.Process(node.pid).children(recursive=True)
        for process in [node, *family]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family, 30)
    node.wait(30)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@needs_ray
@pytest.mark.slow
def test_a_cluster_that_loses_a_node_finishes_every_trial(store, tiny_arguments):
    """Two nodes joined by address; one is killed with the trial that it runs."""
    fixed = {**fields_of(tiny_arguments), "epochs": 30, "preflight": False}
    file = write(store, fixed=fixed, grid={"seed": [0, 1, 2]})
    address = f"127.0.0.1:{free_port()}"
    secret = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": os.urandom(32).hex()}
    with ExitStack() as stack:
        head = [f"--port={address.split(':')[1]}", "--head", "--include-dashboard=false"]
        stack.enter_context(ray_node("h", *head, **secret))
        second = stack.enter_context(ray_node("s", f"--address={address}", **secret))

        sweep = Training(store, ["sweep", "--sweep", file, "--address", address], **secret)
        wait_until(
            lambda: is_training(store, 2) or has_ended(sweep),
            what="a trial trains on each node",
        )
        assert not has_ended(sweep), sweep.output
        theirs = {str(p.pid) for p in psutil.Process(second.pid).children(recursive=True)}
        running = [run for run in runs("main") if run.info.status == "RUNNING"]
        lost = [run for run in running if run.data.tags["pid"] in theirs]
        assert (len(running), len(lost)) == (2, 1)
        kill_with_children(second)
        assert sweep.wait() == 0, sweep.output

    assert "its worker was lost" in sweep.output
    (parent,) = runs("sweep")
    assert parent.info.status == "FINISHED"
    trials = trials_of(parent.info.run_id).values()
    assert [trial["state"] for trial in trials] == ["finished"] * 3
    experts = {run.info.run_id: run for run in runs("main")}
    assert {trial["run_id"] for trial in trials} == set(experts)
    assert {run.info.status for run in experts.values()} == {"FINISHED"}
    assert all(run.data.tags["calibrated"] == "true" for run in experts.values())
    resumed = {run_id for run_id, run in experts.items() if "resumed" in run.data.tags}
    assert resumed == {lost[0].info.run_id}
