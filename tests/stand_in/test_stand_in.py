"""What a GPU would run, but for CUDA's own calls, on a device that stands in for one.

Every tensor has to be where the operator that takes it runs; values are read back and sent where
no graph is recorded; a replay depends on nothing but the memory it was recorded with. Three experts
at the same time, their validations, checkpoints, calibration, logits and models.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from mlflow.entities import Run
from reliability.harness import history

from longtail_experts.cli import main

HERE = Path(__file__).parent
PROJECT = HERE.parents[1]
CODE = """
import sys
import stand_in_device
stand_in_device.install()
from longtail_experts.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def small_network():
    """Not here: other processes train too."""


@pytest.fixture
def source(tmp_path) -> Path:
    """The project's, where CUDA has another name and forward passes are recorded early."""
    folder = tmp_path / "src"
    shutil.copytree(PROJECT / "src", folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(PROJECT / "configs", tmp_path / "configs")
    for path in folder.rglob("*.py"):
        text = path.read_text().replace("cuda", "standin")
        path.write_text(re.sub(r"^RECORD_AFTER = \d+$", "RECORD_AFTER = 1", text, flags=re.M))
    return folder


def runs() -> list[Run]:
    client = MlflowClient()
    return client.search_runs([client.get_experiment_by_name("tests").experiment_id])


@pytest.mark.slow
@pytest.mark.skipif(
    torch.__version__ < "2.15",
    reason="in PyTorch 2.11, torch.export without a CUDA device crashes beside such a device",
)
def test_experts_at_the_same_time_on_a_device_of_its_own(source, store, tiny_arguments):
    """Beside one trained on the CPU, at a rate so small that rounding does not grow."""
    arguments = [*tiny_arguments, "--epochs", "2", "--lr", "0.0005", "--validation_every", "1"]
    assert main(["main", "--loss", "balanced_softmax", *arguments]) == 0
    (plain,) = runs()
    done = subprocess.run(
        [sys.executable, "-c", CODE, "main", *arguments, "--loss", "all", "--device", "standin"],
        env={**os.environ, "PYTHONPATH": f"{source}{os.pathsep}{HERE}"},
        cwd=store,
        check=False,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "3 experts, at the same time" in done.stdout
    assert "not replayed" not in done.stderr
    experts = [run for run in runs() if run.info.run_id != plain.info.run_id]
    by_loss = {run.data.tags.get("expert"): run for run in experts}
    for loss in ("ce", "logit_adjust", "balanced_softmax"):
        assert by_loss[loss].info.status == "FINISHED"
        assert by_loss[loss].data.tags["step_path"] == "graph"
        assert by_loss[loss].data.metrics["peak_memory_bytes"] == 1e9  # what the device says
    ours, theirs = (history(r.info.run_id) for r in (by_loss["balanced_softmax"], plain))
    for name, tolerance in (("train/loss", 0.01), ("val/loss", 0.05)):
        steps, expected = zip(*theirs[name], strict=True)
        assert len(expected) == 2
        assert [step for step, _ in ours[name]] == list(steps)
        assert [value for _, value in ours[name]] == pytest.approx(expected, rel=tolerance)
