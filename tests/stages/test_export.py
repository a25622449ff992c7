"""The tree that AR-GSE reads: names, dtypes, shapes, row order."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from mlflow import MlflowClient

from longtail_experts import load_expert_logits
from longtail_experts.cli import main
from longtail_experts.data.sources import CIFARS
from longtail_experts.learning.resnet import ResNet32
from longtail_experts.stages import export
from longtail_experts.tracking.runs import Run, RunError

NAMES = {"ce": "ce", "logit_adjust": "logitadjust", "balanced_softmax": "balsoftmax"}
SPLITS = ("train", "tuneV", "val_small", "calib", "val_lt", "test_lt")


def test_the_tree_that_argse_reads(finished, tmp_path, caplog):
    ids = ",".join(finished[loss] for loss in NAMES)
    assert main(["export", "--run_ids", ids, "--out", str(tmp_path / "out")]) == 0
    out, name = tmp_path / "out", "images_natural"
    expected = {f"data/{name}_splits/{s}_{w}.json" for s in SPLITS for w in ("indices", "targets")}
    expected |= {f"data/{name}_splits/index_space.json", f"outputs/logits/{name}/runs.json"}
    for label in NAMES.values():
        expected |= {f"outputs/logits/{name}/{label}_baseline/{s}_logits.pt" for s in SPLITS}
        expected |= {
            f"checkpoints/experts/{name}/{kind}_{label}_baseline.pth"
            for kind in ("best", "final_calibrated")
        }
    assert {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()} == expected
    said = [r.message.partition(" source ")[0] for r in caplog.records]
    assert said.count("indices are in the order of the") == 1

    for loss, label in NAMES.items():
        expert = load_expert_logits(finished[loss])
        for split in SPLITS:
            path = out / f"outputs/logits/{name}/{label}_baseline/{split}_logits.pt"
            logits = torch.load(path, weights_only=True)
            stored = expert.splits[split]
            assert (logits.dtype, tuple(logits.shape)) == (torch.float16, stored.logits.shape)
            expected_values = (stored.logits / np.float32(expert.temperature)).astype(np.float16)
            np.testing.assert_array_equal(logits.numpy(), expected_values)
            indices = json.loads((out / f"data/{name}_splits/{split}_indices.json").read_text())
            assert indices == stored.indices.tolist()
        for kind, temperature in (("best", 1.0), ("final_calibrated", expert.temperature)):
            path = out / f"checkpoints/experts/{name}/{kind}_{label}_baseline.pth"
            weights = torch.load(path, weights_only=True)
            assert {value.dtype for value in weights.values()} == {torch.float32}
            assert weights["temperature"].shape == (1,)
            assert float(weights.pop("temperature")) == pytest.approx(temperature, rel=1e-6)
            ResNet32(5).load_state_dict(weights)
            of_run = mlflow.artifacts.download_artifacts(
                run_id=finished[loss], artifact_path="checkpoints/final_calibrated.pt"
            )
            for tensor, own in torch.load(of_run, weights_only=True)["model"].items():
                assert torch.equal(weights[tensor], own)


@pytest.mark.parametrize(
    ("manifest", "name"),
    [
        ({"imbalance_profile": "exp", "imbalance_factor": 100.0}, "cifar100_lt_if100"),
        ({"imbalance_profile": "exp", "imbalance_factor": 10.0}, "cifar100_lt_if10"),
        (
            {"imbalance_profile": "exp", "imbalance_factor": 10.0, "images_per_class": 500}
            | {"source": "cifar10"},
            "cifar10_lt_if10_n500",
        ),
        ({"imbalance_profile": "step", "imbalance_factor": 50.0}, "cifar100_lt_step_if50"),
        ({"imbalance_profile": "natural", "imbalance_factor": None}, "cifar100_natural"),
        (
            {"imbalance_profile": "exp", "imbalance_factor": 100.0, "images_per_class": 500},
            "cifar100_lt_if100",
        ),
        (
            {"imbalance_profile": "exp", "imbalance_factor": 5.0, "images_per_class": 10},
            "cifar100_lt_if5_n10",
        ),
    ],
)
def test_names_of_data_sets(manifest, name):
    source = {"source": "cifar100", "images_per_class": None}
    assert export.dataset_name(source | manifest) == name


def test_an_expert_that_argse_has_no_place_for_is_not_called_none(experts_copy, capfd):
    ce = experts_copy["ce"]
    MlflowClient().set_tag(ce, "expert", "focal")
    assert main(["export", "--run_ids", ce, "--out", "out"]) == 2
    assert "no place for loss focal; give runs of ce, logit_adjust, balanced_softmax" in (
        capfd.readouterr().err
    )


def test_refusals_come_before_anything_is_written(finished, tmp_path, capfd):
    out = tmp_path / "out"

    def refused(ids: str, folder: Path = out) -> str:
        capfd.readouterr()
        assert main(["export", "--run_ids", ids, "--out", str(folder)]) == 2
        (line,) = capfd.readouterr().err.strip().splitlines()
        return line

    ce = finished["ce"]
    assert "two runs of loss ce" in refused(f"{ce},{ce}")
    assert "not found" in refused("nosuchrun")
    assert "is not the run of an expert" in refused(finished["all"])
    assert "run_ids" in refused(" , ")
    assert not out.exists()
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused(ce, tmp_path / "file" / "out")
    in_the_way = tmp_path / "o/outputs/logits/images_natural/ce_baseline/test_lt_logits.pt"
    in_the_way.mkdir(parents=True)
    assert "test_lt_logits.pt is a folder; remove it" in refused(ce, tmp_path / "o")
    assert not [path for path in (tmp_path / "o").rglob("*") if path.is_file()]


def test_another_order_of_cifar_than_torchvisions_is_said(finished, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(export, "CIFARS", {"images": CIFARS["cifar100"]})
    export.run([finished["ce"]], tmp_path)
    order = "indices are not in torchvision's order of CIFAR-100 but in the order of the source"
    assert sum(record.message.startswith(order) for record in caplog.records) == 1


def test_a_file_in_the_way_is_refused_before_anything_is_moved(finished, tmp_path):
    (tmp_path / "outputs").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        export.run([finished["ce"]], tmp_path)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [tmp_path / "outputs"]


def test_experts_of_different_splits_are_refused(finished, tmp_path, monkeypatch):
    from longtail_experts.tracking.runs import Run

    monkeypatch.setattr(Run, "params", property(lambda self: {"splits_sha256": self.run_id}))
    with pytest.raises(RunError, match="different splits"):
        export.run([finished["ce"], finished["logit_adjust"]], tmp_path)


def test_values_beyond_float16_are_refused(finished, monkeypatch):
    expert = load_expert_logits(finished["ce"])
    object.__setattr__(expert, "temperature", 1e-6)
    with pytest.raises(RunError, match="beyond float16's 65504"):
        export.half_precision_logits(expert)


def test_a_failed_write_leaves_no_file(finished, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(RunError, match="No space left"):
        export.run([finished["ce"]], tmp_path)
    assert not list(tmp_path.rglob("*.pt"))
    assert not list(tmp_path.rglob("*.json"))


def test_experts_of_other_splits_are_not_put_beside_those_that_are_there(
    finished, tmp_path, capsys
):
    def export(loss: str) -> int:
        return main(["export", "--run_ids", finished[loss], "--out", str(tmp_path / "out")])

    def there() -> dict[Path, bytes]:
        return {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}

    assert export("ce") == 0
    assert export("logit_adjust") == 0  # of the same splits
    indices = tmp_path / "out/data/images_natural_splits/calib_indices.json"
    indices.write_text(json.dumps(json.loads(indices.read_text())[::-1]))
    before = there()
    assert export("balanced_softmax") == 2
    assert "calib_indices.json is of other images or splits" in capsys.readouterr().err
    assert there() == before


@pytest.mark.parametrize("name", ["index_space.json", "calib_targets.json"])
@pytest.mark.parametrize("loss", ["ce", "logit_adjust"])
def test_equal_rows_of_other_images_are_other_splits(finished, tmp_path, capsys, name, loss):
    """As of two folders with as many images a class, whose indices are the same."""
    out = tmp_path / "out"
    assert main(["export", "--run_ids", finished["ce"], "--out", str(out)]) == 0
    (out / "data/images_natural_splits" / name).write_text('{"index_space": "of others"}')
    assert main(["export", "--run_ids", finished[loss], "--out", str(out)]) == 2
    assert f"{name} is of other images or splits" in capsys.readouterr().err


def test_of_which_run_each_expert_is_stands_beside_its_logits(finished, tmp_path, caplog):
    out = tmp_path / "out"
    path = out / "outputs/logits/images_natural/runs.json"

    def export_and_read(loss: str) -> dict:
        assert main(["export", "--run_ids", finished[loss], "--out", str(out)]) == 0
        return json.loads(path.read_text())

    export_and_read("ce")
    runs = export_and_read("logit_adjust")
    export_and_read("ce")  # the same run again is no other one
    assert not [r for r in caplog.records if "is replaced" in r.getMessage()]
    for loss, label in (("ce", "ce_baseline"), ("logit_adjust", "logitadjust_baseline")):
        params = MlflowClient().get_run(finished[loss]).data.params
        assert runs.pop(label) == {
            "run_id": finished[loss],
            "seed": params["seed"],
            "expert_seed": params["expert_seed"],
            "splits_sha256": params["splits_sha256"],
            "temperature": load_expert_logits(finished[loss]).temperature,
        }
    assert not runs

    path.write_text('{"ce_baseline": {"run_id": "another"}, "logitadjust_baseline": "?"}')
    assert export_and_read("ce")["ce_baseline"]["run_id"] == finished["ce"]
    assert "ce_baseline of run another is replaced" in caplog.text
    assert "logitadjust_baseline, of a run that runs.json does not name, stays" in caplog.text
    path.write_text("not JSON")
    assert list(export_and_read("ce")) == ["ce_baseline"]
    assert "ce_baseline, of a run that runs.json does not name, is replaced" in caplog.text


def test_exports_at_the_same_time_come_one_after_another(finished, tmp_path, monkeypatch):
    """Else each could find the folder empty, and the later one's rows lie beside the other's."""
    out, written = tmp_path / "out", export.write_files
    both = threading.Barrier(2, timeout=1)  # seconds; none comes while the other is here

    def wait_and_write(*arguments):
        with suppress(threading.BrokenBarrierError):
            both.wait()
        written(*arguments)

    monkeypatch.setattr(export, "write_files", wait_and_write)
    with ThreadPoolExecutor(2) as threads:
        losses = ("ce", "logit_adjust")
        list(threads.map(lambda loss: export.run([finished[loss]], out), losses))
    assert both.broken
    runs = json.loads((out / "outputs/logits/images_natural/runs.json").read_text())
    assert {run["run_id"] for run in runs.values()} == {finished[loss] for loss in losses}


def test_a_temperature_at_the_bound_is_said_to_be_no_estimate(experts_copy, tmp_path, caplog):
    MlflowClient().log_metric(experts_copy["ce"], "temperature_at_bound", 1, step=10**6)
    export.run([experts_copy["ce"]], tmp_path / "out")
    assert f"run {experts_copy['ce']}: T = " in caplog.text
    assert "is at the bound of the search" in caplog.text


def test_weights_that_argse_cannot_load_are_named(finished, tmp_path, caplog, monkeypatch):
    export.run([finished["ce"]], tmp_path / "projection")
    assert "shortcut" not in caplog.text
    params = property(lambda run: real.fget(run) | {"shortcut": "pad"})
    real = Run.params
    monkeypatch.setattr(Run, "params", params)
    export.run([finished["ce"]], tmp_path / "pad")
    assert f"run {finished['ce']}: shortcut=pad: its weights have no shortcut.*" in caplog.text


def test_out_is_where_a_shell_would_have_it(finished, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["export", "--run_ids", finished["ce"], "--out", "~/out"]) == 0
    assert f"written below {tmp_path / 'out'}" in capfd.readouterr().out
    assert (tmp_path / "out/outputs").is_dir()
    for out, says in (("", "out='': give a path"), (300 * "x", "File name too long")):
        assert main(["export", "--run_ids", finished["ce"], "--out", out]) == 2
        (line,) = capfd.readouterr().err.strip().splitlines()
        assert says in line


def test_torchvisions_order_is_not_that_of_an_export_with_another(tmp_path):
    files = {"data/a_splits/calib_indices.json": [0, 1]}
    export.write_files(tmp_path, files | {"data/a_splits/index_space.json": {"index_space": "x"}})
    with pytest.raises(RunError, match=r"index_space\.json is of other images"):
        export._require_same_rows(tmp_path, files)
