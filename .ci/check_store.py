"""After the README's main job: the runs that plain `mlflow ui` in this folder would show."""

import json
import subprocess
import sys
from pathlib import Path

from mlflow import MlflowClient

from longtail_experts import load_expert_logits

client = MlflowClient()
runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
checks = {
    "the default store is ./mlflow.db with artifacts below ./mlruns": Path("mlflow.db").is_file()
    and any(Path("mlruns").glob("*/*/artifacts/report.md")),
    "every run is FINISHED": bool(runs) and all(run.info.status == "FINISHED" for run in runs),
    "the demo says that it is one": any(
        run.data.tags.get("data.source") == "synthetic"
        and "DEMO" in run.info.run_name
        and "Synthetic images" in run.data.tags["mlflow.note.content"]
        for run in runs
    ),
}
experts = [run for run in runs if "expert" in run.data.tags]
for run in experts:
    expert = load_expert_logits(run.info.run_id)
    where = f"{run.data.tags['expert']} on {run.data.tags['data.source']}"
    checks[f"{where}: seven splits of logits"] = len(expert.splits) == 7
    checks[f"{where}: temperature as logged"] = (
        run.data.metrics["temperature"] == expert.temperature
    )
real = [run for run in experts if run.data.tags["data.source"] == "cifar100"]
if real:
    ids = ",".join(run.info.run_id for run in real)
    command = ["mlflow", "run", ".", "--env-manager", "local", "-e", "export"]
    command += ["-P", f"run_ids={ids}", "-P", "out=outputs/argse"]
    done = subprocess.run(command, check=False).returncode == 0
    files = sorted(p.name for p in Path("outputs/argse").rglob("*") if p.is_file())
    checks["three experts exported for AR-GSE: 18 logits, 6 checkpoints"] = (
        done
        and sum(name.endswith("_logits.pt") for name in files) == 18
        and sum(name.endswith(".pth") for name in files) == 6
    )
stages = {run.data.tags["stage"] for run in runs}
checks["preflight, sweep and compare left their runs"] = {"preflight", "sweep", "compare"} <= stages
(sweep,) = [run for run in runs if run.data.tags["stage"] == "sweep"]
trials = json.loads(Path(client.download_artifacts(sweep.info.run_id, "trials.json")).read_text())
checks["four trials of the sweep are finished experts"] = len(trials) == 4 and {
    trial["run_id"] for trial in trials
} <= {run.info.run_id for run in experts}
command = ["mlflow", "run", ".", "--env-manager", "local", "-e", "compare"]
command += ["-P", f"sweep={sweep.info.run_id}"]
checks["compare -P sweep= tabulates them"] = subprocess.run(command, check=False).returncode == 0
command = ["python", "-m", "longtail_experts", "results", "--sweeps", sweep.info.run_id]
command += ["--out", "outputs/results.md"]
done = subprocess.run(command, check=False).returncode == 0
checks["results writes its page"] = done and "± " in Path("outputs/results.md").read_text()
for run in runs:
    if run.data.tags["stage"] == "all":
        page = client.download_artifacts(run.info.run_id, "comparison/index.html")
        drawn = client.list_artifacts(run.info.run_id, "comparison/figures")
        inside = Path(page).read_text().count("data:image/png")
        checks["the parent's comparison holds its figures"] = inside == len(drawn) >= 4
for what, passed in checks.items():
    print(f"{'ok' if passed else 'FAILED':6} {what}")
failed = sum(not passed for passed in checks.values())
print(f"{len(checks) - failed} passed, {failed} failed")
sys.exit(failed > 0)
