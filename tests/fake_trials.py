"""Runs as a sweep leaves them, without a training: config, params, metrics and tags."""

import tempfile
from pathlib import Path

import yaml
from mlflow import MlflowClient

from longtail_experts.config import make_config
from longtail_experts.data.batches import derive_seed


def experiment(client: MlflowClient, folder: Path) -> str:
    found = client.get_experiment_by_name("tests")
    if found is not None:
        return found.experiment_id
    return client.create_experiment("tests", artifact_location=str(folder / "artifacts"))


def add_sweep(folder: Path, name: str = "sweep of losses", grid: str | None = None) -> str:
    """A parent run in the store of the working folder; its id."""
    client = MlflowClient()
    tags = {"stage": "sweep", "git.commit": "c" * 40}
    run = client.create_run(experiment(client, folder), tags=tags, run_name=name)
    if grid is not None:
        client.log_text(run.info.run_id, grid, "sweep.yaml")
    client.set_terminated(run.info.run_id)
    return run.info.run_id


def add_trial(
    folder: Path,
    sweep_id: str,
    metrics: dict[str, float],
    *,
    splits: str | None = None,
    tags: dict[str, str | None] | None = None,
    extra: dict | None = None,
    manifest: dict | None = None,
    started: int | None = None,
    **fields,
) -> str:
    """An expert's run; `extra` are fields of config.yaml that Config may not know."""
    fields = {"device": "cpu", "precision": "fp32", **fields}
    config = make_config(fields)
    if config.expert_seed is None:
        config = config.replace(expert_seed=derive_seed(config.seed, config.loss))
    content = yaml.safe_load(config.to_yaml()) | (extra or {})
    client = MlflowClient()
    all_tags = {
        "stage": "main",
        "expert": config.loss,
        "calibrated": "true",
        "mlflow.parentRunId": sweep_id,
        "device": config.device,
        "precision": config.precision,
        "step_path": "eager",
        "git.commit": "c" * 40,
        "git.dirty": "false",
        **(tags or {}),
    }
    run = client.create_run(
        experiment(client, folder),
        start_time=started,
        tags={name: value for name, value in all_tags.items() if value is not None},
        run_name=f"{config.loss} seed {config.seed}",
    )
    run_id = run.info.run_id
    client.log_param(run_id, "splits_sha256", splits or f"{config.split_seed:064d}")
    for metric, value in metrics.items():
        client.log_metric(run_id, metric, value)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "config.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        client.log_artifact(run_id, str(path))
    if manifest is not None:
        client.log_dict(run_id, manifest, "splits/manifest.json")
    client.set_terminated(run_id)
    return run_id
