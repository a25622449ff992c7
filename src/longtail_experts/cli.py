"""Arguments -> Config -> stage; exit codes; error messages.

Exit codes: 0 done; 1 a run failed, or is not ready to start; 2 bad input, nothing done; 130 and
143 on Ctrl-C and SIGTERM (or SIGHUP). `mlflow run` makes 1 of all but 0.
"""

import argparse
import contextlib
import gc
import io
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NoReturn, TextIO, get_args, get_origin

from longtail_experts.config import (
    MLFLOW_RUN,
    Config,
    ConfigError,
    expanded,
    load_config,
    nearest,
    shorten,
)
from longtail_experts.data.addresses import without_passwords
from longtail_experts.learning.garbage import no_garbage_collected
from longtail_experts.tracking.interrupts import (
    ENDING,
    Terminated,
    delayed_signals,
    ignored_signals,
    raise_terminated,
)

log = logging.getLogger(__name__)

ENTRY_POINTS = {
    "main": "train, calibrate and record one expert in one run (loss=all: three, as child runs)",
    "preflight": "the readiness report before hours are spent: knobs, data, memory, disk, time",
    "data": "build and verify the splits; log them with their manifest and figures",
    "train": "train one expert; calibrate does the rest, on any later day",
    "calibrate": "temperature, test figures, logits and model, into the training run run_id",
    "export": "write the files that AR-GSE reads, from one run each of ce, logit_adjust and "
    "balanced_softmax, or some of them",
    "compare": "table and figures across finished experts, and their ensembles; or of a sweep, "
    "means with intervals",
    "results": "a page of sweeps for people, with figures: means, intervals, published figures",
    "sweep": "a grid of experts from one file, run by Ray here or on a cluster; what the store has "
    "is not repeated, and the same command goes on with what was cut off",
    "reap": "mark runs as FAILED whose process is gone, after delivering what they left behind",
}
OWN_PARAMETERS = {
    "calibrate": {"run_id": "the training run"},
    "export": {"run_ids": "finished runs: a,b,c", "out": "folder to write into"},
    "compare": {
        "run_ids": "finished experts: a,b,c; none: the newest of each loss, or see below",
        "experiment": "where to look for them (default: where a run started now would go)",
        "tags": "only runs with these tags: name=value,name=value",
        "last": "the newest N of them",
        "deployment": "class prior to which all scores are converted: uniform (test_balanced), or "
        "test_lt (that split's own frequencies)",
        "different_splits": "true: tabulate even experts of different splits",
        "sweep": "a sweep's run, instead of all that: means over its seeds with intervals, and "
        "paired differences from cross-entropy",
    },
    "results": {
        "sweeps": "the sweeps' runs: a,b",
        "out": "the page to write, figures beside it (mlflow run without it: docs/results.md)",
    },
    "sweep": {
        "sweep": "a sweep file: path, or name in configs/sweeps/ (config, fixed, grid: {field: "
        "[values]}, trials_at_once, cpus_per_trial, gpus_per_trial); fields given beside it "
        "override its `fixed`",
        "address": "of a Ray cluster, as in 10.0.0.1:6379; local: Ray on this machine",
    },
    "reap": {
        "run_id": "one run, of any host, whose process you know to be gone; none: all of this host"
    },
}
OPTIONAL = ("compare", "reap")  # entry points whose own parameters may be left out
OPTIONAL_PARAMETERS = ("address",)
RESUMABLE = ("main", "train")
CALIBRATE_MAY_CHANGE = ("data_dir", "device", "batch_size")
FULL_RECIPE, DEMO_RECIPE = "cifar100_lt", "demo"

DEMO_BANNER = """\
*******************************************************************************
* DEMO: no CIFAR-100 in {folder} and it cannot be downloaded.
* Synthetic images stand in for it: these numbers say nothing about CIFAR-100.
* The full recipe: put CIFAR-100 in {folder}, or give -P data_dir=FOLDER
*******************************************************************************"""


class _OneLine(logging.Formatter):
    """`warning: what there is to say`, beside the `error: ` of a refusal."""

    def format(self, record: logging.LogRecord) -> str:
        return f"{record.levelname.lower()}: {super().format(record)}"


class _Lasting:
    """A stream that outlives its reader: a training whose terminal or pipe is gone goes on. What
    anybody, MLflow too, writes of an address comes without the password."""

    def __init__(self, stream: TextIO | None):
        self._stream = stream or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
        if isinstance(self._stream, io.TextIOWrapper):  # whatever it cannot show is spelled out
            self._stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        try:
            self._stream.write(without_passwords(text))
            return len(text)
        except OSError:
            self._let_go()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._let_go()

    def _let_go(self) -> None:
        with open(os.devnull, "wb") as nowhere:  # for what is in its buffer, and for the rest
            os.dup2(nowhere.fileno(), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def main(arguments: list[str]) -> int:
    out, err = _Lasting(sys.stdout), _Lasting(sys.stderr)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            return _main(arguments)
        finally:
            out.flush()
            err.flush()


def _main(arguments: list[str]) -> int:
    handler = logging.StreamHandler()
    handler.setFormatter(_OneLine())
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    # Importing mlflow.pytorch sets the root to ERROR where nothing has been set before.
    logging.getLogger("longtail_experts").setLevel(logging.WARNING)
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # we say ourselves what is tried again
    for number in ENDING - {signal.SIGINT}:
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
            signal.signal(number, raise_terminated)
    if os.environ.get("LONGTAIL_OFFLINE") == "1":  # before MLflow is imported, which looks then
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    try:
        return _dispatch(arguments)
    except (KeyboardInterrupt, Terminated) as stop:
        is_interrupt = isinstance(stop, KeyboardInterrupt)
        print("interrupted" if is_interrupt else "terminated", stop, file=sys.stderr)
        if "MLFLOW_RUN_ID" in os.environ:  # which whoever opens that run takes away
            with ignored_signals():  # `mlflow run` sends SIGTERM a moment after a Ctrl-C
                from longtail_experts.tracking.runs import end_unopened_run

                end_unopened_run()
        return 130 if is_interrupt else 143
    except ConfigError as error:
        return _complain(error, 2)


def _complain(error: Exception, code: int) -> int:
    says = shorten(without_passwords(" ".join(str(error).split())), 1000)
    print("error:", says, file=sys.stderr)
    if "MLFLOW_RUN_ID" in os.environ:  # the launcher's run, which has nothing on its page yet
        from longtail_experts.tracking.runs import note_failure

        note_failure(says)
    return code


# --- arguments --------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see --help)")


def parser() -> Parser:
    top = Parser(
        prog="python -m longtail_experts",
        description="Calibrated ResNet-32 experts on CIFAR-100-LT, recorded in MLflow.",
        epilog="`python -m longtail_experts ENTRY_POINT --help` lists its parameters. The same "
        f"through MLflow: {MLFLOW_RUN} -e ENTRY_POINT -P field=value",
        allow_abbrev=False,
    )
    entries = top.add_subparsers(dest="entry_point", metavar="ENTRY_POINT", required=True)
    for name, does in ENTRY_POINTS.items():
        entry = entries.add_parser(
            name,
            help=does,
            description=does,
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
        )
        for own, about in OWN_PARAMETERS.get(name, {}).items():
            required = name not in OPTIONAL and own not in OPTIONAL_PARAMETERS
            entry.add_argument(f"--{own}", required=required, help=about)
        if name in RESUMABLE:
            entry.add_argument(
                "--resume",
                metavar="RUN_ID",
                help="go on with a run that was interrupted or failed, under its own config",
            )
        if name not in OWN_PARAMETERS:
            entry.add_argument(
                "--config",
                default="auto",
                help="a recipe: path, or name in configs/; auto: the full one where there is "
                "CIFAR-100, else the demo",
            )
        for field in _config_fields(name):
            about = (Config.model_fields[field].description or "").replace("%", "%%")
            entry.add_argument(f"--{field}", help=about, metavar=_values_of(field))
    return top


def _values_of(field: str) -> str:
    """What a field takes, for the usage line."""
    kind = Config.model_fields[field].annotation
    if kind is bool:
        return "{true,false}"
    return f"{{{','.join(get_args(kind))}}}" if get_origin(kind) is Literal else "VALUE"


def _config_fields(entry_point: str) -> tuple[str, ...]:
    """The fields of the config that an entry point takes."""
    if entry_point == "calibrate":
        return CALIBRATE_MAY_CHANGE
    if entry_point == "sweep":
        return tuple(Config.model_fields)
    return () if entry_point in OWN_PARAMETERS else tuple(Config.model_fields)


def _joined(arguments: list[str]) -> list[str]:
    """`--name value` as `--name=value`: argparse would take the value -1e-3 for a flag."""
    joined: list[str] = []
    for argument in arguments:
        previous = joined[-1] if joined else ""
        if previous.startswith("--") and "=" not in previous and not argument.startswith("--"):
            joined[-1] = f"{previous}={argument}"
        else:
            joined.append(argument)
    return joined


def _parse(arguments: list[str]) -> dict[str, Any]:
    entry_point, *rest = arguments or ["--help"]
    if not entry_point.startswith("-") and entry_point not in ENTRY_POINTS:
        raise ConfigError(
            f"no entry point {shorten(entry_point)!r}{nearest(entry_point, list(ENTRY_POINTS))}"
        )
    known, unknown = parser().parse_known_args([entry_point, *_joined(rest)])
    if unknown:
        name = unknown[0].split("=")[0].lstrip("-")
        if not unknown[0].startswith("--"):
            raise ConfigError(f"{shorten(unknown[0])!r}: fields are given as --name value")
        own = [*OWN_PARAMETERS.get(entry_point, ("config",))]
        own += ["resume"] * (entry_point in RESUMABLE)
        raise ConfigError(
            f"unknown field {shorten(name)!r}{nearest(name, [*own, *_config_fields(entry_point)])}"
        )
    return vars(known)


# --- config -----------------------------------------------------------------------------------


def choose_config(name: str, overrides: dict[str, str]) -> tuple[Config, str | None]:
    """The config asked for, and the banner of the demo where it stands in for the full recipe.

    Naming a config, a source, a data_dir or LDAM's subset switches the fallback off.
    """
    if name != "auto":
        return load_config(name, overrides), None
    config = load_config(FULL_RECIPE, overrides)
    if {"source", "data_dir"} & overrides.keys() or overrides.get("subset_rule") == "ldam":
        return config, None
    from longtail_experts.data.sources import cifar100_can_be_downloaded, cifar100_on_disk

    try:
        is_there = cifar100_on_disk(Path(config.data_dir or "data"))
    except OSError as error:
        raise ConfigError(f"data_dir={config.data_dir}: {error.strerror}") from None
    if is_there or cifar100_can_be_downloaded():
        return config, None
    return load_config(DEMO_RECIPE, overrides), DEMO_BANNER.format(folder=f"{config.data_dir}/")


def warn_about(config: Config) -> None:
    late = [m for m in config.milestones if m >= config.epochs]
    if late and config.lr_schedule == "milestones":
        log.warning("milestones=%s lie at or past epochs=%s and will not act", late, config.epochs)


# --- stages -----------------------------------------------------------------------------------


def _dispatch(arguments: list[str]) -> int:
    given = _parse(arguments)
    entry_point = given.pop("entry_point")
    if "MLFLOW_RUN_ID" in os.environ:
        # What is half imported could not be imported to end that run.
        with delayed_signals(), _importing():
            import longtail_experts.tracking.runs  # noqa: F401
    if entry_point == "sweep":
        return _sweep(given.pop("sweep"), given.pop("address", "local"), given)
    if entry_point in OWN_PARAMETERS:
        return _on_recorded_runs(entry_point, given)
    if "resume" in given:
        return _resume(given.pop("resume"), given.pop("config"), given)
    name = given.pop("config")
    config, banner = choose_config(name, given)
    if entry_point in RESUMABLE and (run_id := _begun_run()):
        return _resume(run_id, name, given)
    if banner:
        print(banner, flush=True)
    code = _on_config(entry_point, config)
    if banner:
        print(banner, flush=True)
    return code


def _sweep(name: str, address: str, overrides: dict[str, str]) -> int:
    from longtail_experts.stages.grid import points_of, read_sweep

    plan = read_sweep(name, overrides)
    points = points_of(plan)
    from longtail_experts.data.sources import DataError
    from longtail_experts.stages import sweep as sweep_stage

    sweep_stage.require_ray()
    try:
        return _finish(lambda: sweep_stage.run(plan, points, address))
    except DataError as error:
        return _complain(error, 2)


def _on_config(entry_point: str, config: Config) -> int:
    if entry_point == "train" and config.loss == "all":
        raise ConfigError("loss=all: train takes one loss; main trains all three")
    if entry_point == "train" or (entry_point == "main" and not config.preflight):
        warn_about(config)  # which preflight does, and more
    with _importing():
        from longtail_experts.data.sources import DataError
        from longtail_experts.stages.inputs import load_dataset, prepare, resolve

    config = resolve(config)
    try:
        data = load_dataset(config)
    except DataError as error:
        return _complain(error, 2)
    if entry_point != "data":  # the others take steps
        prepare(config, data)  # while the rest is imported, and the store opened
    # The store is opened only now, when config and images are known to be good.
    with _importing():
        from longtail_experts.stages import data as data_stage
        from longtail_experts.stages import main as main_stage
        from longtail_experts.stages import preflight as preflight_stage
        from longtail_experts.stages import train as train_stage

    stage = {
        "main": main_stage.run,
        "preflight": preflight_stage.run,
        "data": data_stage.run,
        "train": train_stage.run,
    }[entry_point]
    return _finish(lambda: stage(config, data))


@contextlib.contextmanager
def _importing() -> Iterator[None]:
    """What is imported in here, and has come to stay, is never looked through for garbage: a fifth
    of the time that it takes to import MLflow and PyTorch."""
    num_before = len(sys.modules)
    with no_garbage_collected():
        yield
        if len(sys.modules) > num_before:
            gc.freeze()


def _finish(work: Callable[[], str]) -> int:
    """Run a stage that returns its run id; the exit code."""
    from longtail_experts.learning.step import NonFiniteLossError
    from longtail_experts.stages.main import ExpertsFailedError
    from longtail_experts.tracking.runs import FAILURES, StoreError

    try:
        print(f"run {work()} FINISHED")
    except StoreError as error:
        return _complain(error, 2)
    except (NonFiniteLossError, ExpertsFailedError, *FAILURES) as error:
        return _complain(error, 1)
    return 0


def _begun_run() -> str | None:
    """The run of `mlflow run --run-id`, where it is one that was begun before."""
    run_id = os.environ.get("MLFLOW_RUN_ID")
    if run_id is None:
        return None
    from longtail_experts.tracking.runs import RunError
    from longtail_experts.tracking.stale import was_begun

    try:
        return run_id if was_begun(run_id) else None
    except RunError as error:
        raise ConfigError(f"MLFLOW_RUN_ID: {error}") from None


def _resume(run_id: str, config_name: str, given: dict[str, str]) -> int:
    """Go on with a run under its own config; fields given beside it must agree with that."""
    recipe = None if config_name == "auto" else load_config(config_name, given)
    from longtail_experts.data.sources import DataError
    from longtail_experts.stages import main as main_stage
    from longtail_experts.stages import resumed
    from longtail_experts.stages import train as train_stage
    from longtail_experts.tracking.runs import FAILURES

    try:
        begun = resumed.open_begun(run_id, given, recipe)
    except (*FAILURES, DataError) as error:
        return _complain(error, 2)
    if begun is None:
        return 0
    stage = train_stage if begun.stage == "train" else main_stage

    def go_on() -> str:
        with begun.launcher:  # which fails where this does
            return stage.resume(begun.run, begun.config, begun.data)

    return _finish(go_on)


def _on_recorded_runs(entry_point: str, given: dict[str, str]) -> int:
    from longtail_experts.data.sources import DataError
    from longtail_experts.tracking.runs import FAILURES, came_up_in_a_run

    try:
        if entry_point == "export":
            from longtail_experts.stages import export

            export.run(_ids(given["run_ids"]), _out(given))
        elif entry_point == "compare":
            from longtail_experts.stages import compare

            if sweep_id := _swept(given):
                run_id = compare.run_study(sweep_id)
            else:
                run_id = compare.run(*_comparison(given))
            print(f"run {run_id} FINISHED")
        elif entry_point == "results":
            from longtail_experts.stages import results

            results.run(_ids(given["sweeps"], "sweeps"), _out(given))
        elif entry_point == "reap":
            from longtail_experts.stages import reap

            run_id = given.get("run_id", "none")
            reap.run(None if run_id == "none" else run_id)
        else:
            from longtail_experts.stages import calibrate

            changes = {name: given[name] for name in CALIBRATE_MAY_CHANGE if name in given}
            calibrate.run(given["run_id"], changes)
    except (*FAILURES, DataError) as error:
        return _complain(error, 1 if came_up_in_a_run(error) else 2)
    return 0


def _out(given: dict[str, str]) -> Path:
    if not given["out"].strip():
        raise ConfigError("out='': give a path to write to")
    try:
        return Path(expanded(given["out"]))
    except ValueError as error:
        raise ConfigError(f"out={shorten(given['out'])}: {error}") from None


def _swept(given: dict[str, str]) -> str | None:
    """The sweep to be studied, where one is given, and then nothing else."""
    given = {name: value for name, value in given.items() if value != "none"}
    sweep_id = given.pop("sweep", None)
    if sweep_id is not None and given:
        raise ConfigError(f"sweep together with {next(iter(given))}: give one of them")
    return sweep_id


def _comparison(given: dict[str, str]) -> tuple[list[Any], str, bool]:
    """Which runs, under which deployment prior, and whether of different splits."""
    from longtail_experts.tracking.comparison import DEPLOYMENTS, chosen_runs

    given = {name: value for name, value in given.items() if value != "none"}
    deployment = given.get("deployment", "uniform")
    if deployment not in DEPLOYMENTS:
        raise ConfigError(
            f"deployment={shorten(deployment)!r}: give one of {', '.join(DEPLOYMENTS)}"
        )
    different = given.get("different_splits", "false")
    if different not in ("true", "false"):
        raise ConfigError(f"different_splits={shorten(different)!r}: give true or false")
    last = given.get("last")
    if last is not None and not (last.isascii() and last.isdigit() and 0 < int(last) < 10_000):
        raise ConfigError(f"last={shorten(last)!r}: give a number of runs from 1 to 9999")
    tags = {}
    for pair in given["tags"].split(",") if "tags" in given else []:
        name, equals, value = pair.partition("=")
        if not equals or not name.strip():
            raise ConfigError(f"tags={shorten(given['tags'])!r}: give name=value,name=value")
        if name.strip() in tags:
            raise ConfigError(f"tags={shorten(given['tags'])!r}: {name.strip()} is given twice")
        tags[name.strip()] = value.strip()
    run_ids = _ids(given["run_ids"]) if "run_ids" in given else []
    filters = [name for name in ("experiment", "tags", "last") if name in given]
    if run_ids and filters:
        raise ConfigError(f"run_ids together with {filters[0]}: give the runs or a filter")
    runs = chosen_runs(run_ids, given.get("experiment", ""), tags, last and int(last))
    return runs, deployment, different == "true"


def _ids(text: str, name: str = "run_ids") -> list[str]:
    ids = [part.strip() for part in text.split(",") if part.strip()]
    if not ids:
        raise ConfigError(f"{name}={shorten(text)!r}: give run ids, as in a,b,c")
    return ids
