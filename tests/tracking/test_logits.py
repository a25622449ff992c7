"""load_expert_logits returns what was written, or refuses."""

import copy
import dataclasses
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from conftest import change_json

from longtail_experts import load_expert_logits
from longtail_experts.cli import main
from longtail_experts.tracking.runs import RunError


@pytest.fixture
def logits(editable) -> tuple[str, Path]:
    """A run whose logits may be tampered with, and their folder."""
    run_id, artifacts = editable
    return run_id, artifacts / "logits"


def test_what_is_returned_cannot_be_changed(finished):
    expert = load_expert_logits(finished["balanced_softmax"])
    assert list(expert.splits) == [
        "train", "tuneV", "val_small", "calib", "val_lt", "test_lt", "test_balanced"
    ]  # fmt: skip
    assert expert.tau == 1
    assert expert.prior.sum() == pytest.approx(1)
    np.testing.assert_allclose(expert.log_offset, np.log(expert.prior))
    with pytest.raises(dataclasses.FrozenInstanceError):
        expert.temperature = 1.0
    with pytest.raises(TypeError):
        expert.splits["train"] = None
    for array in (expert.prior, expert.splits["train"].logits, expert.splits["train"].targets):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))])
def test_an_expert_goes_to_other_processes(finished, copied):
    expert = load_expert_logits(finished["ce"])
    there = copied(expert)
    assert (there.run_id, there.temperature) == (expert.run_id, expert.temperature)
    for name, split in expert.splits.items():
        np.testing.assert_array_equal(there.splits[name].logits, split.logits)
    with pytest.raises(TypeError):
        there.splits["train"] = None


def test_test_lt_rows_are_those_of_test_balanced(finished):
    splits = load_expert_logits(finished["ce"]).splits
    position = np.searchsorted(splits["test_balanced"].indices, splits["test_lt"].indices)
    for name in ("logits", "targets", "indices"):
        inside = getattr(splits["test_balanced"], name)[position]
        np.testing.assert_array_equal(getattr(splits["test_lt"], name), inside)


def test_a_file_that_is_not_the_manifests_is_refused(logits):
    run_id, folder = logits
    path = folder / "calib.npz"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(RunError, match=r"calib\.npz is not the file that the manifest describes"):
        load_expert_logits(run_id)


def test_a_missing_file_is_named(logits):
    run_id, folder = logits
    (folder / "tuneV.npz").unlink()
    with pytest.raises(RunError, match=r"logits/tuneV\.npz cannot be read"):
        load_expert_logits(run_id)


MALFORMED = r"manifest\.json is malformed"
OTHER_PRIOR = r"logits/manifest\.json: prior is not that of the images"
NOT_FINITE = r"logits/manifest\.json: tau=nan: must be finite"
NOT_POSITIVE = r"logits/manifest\.json: temperature=0\.0: must be positive"
OTHER_TARGETS = r"calib\.npz has other targets than splits/manifest\.json counts"


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("logits", lambda m: m.pop("temperature"), f"logits/{MALFORMED}"),
        ("logits", lambda m: m["files"].pop("calib"), f"logits/{MALFORMED}"),
        ("logits", lambda m: m.update(prior=m["prior"][:-1]), f"logits/{MALFORMED}"),
        ("logits", lambda m: m.update(log_offset=["x"] * 5), f"logits/{MALFORMED}"),
        ("logits", lambda m: m.update(files=[]), f"logits/{MALFORMED}"),
        ("logits", lambda m: m.update(prior=[0.0] * 5), OTHER_PRIOR),
        ("logits", lambda m: m.update(prior=m["prior"][::-1]), OTHER_PRIOR),
        ("logits", lambda m: m.update(tau=float("nan")), NOT_FINITE),
        ("logits", lambda m: m.update(temperature=0), NOT_POSITIVE),
        ("splits", lambda m: m["splits"].pop("test_lt"), f"splits/{MALFORMED}"),
        ("splits", lambda m: m.update(splits={}), f"splits/{MALFORMED}"),
        ("splits", lambda m: m["splits"]["calib"]["class_counts"].reverse(), OTHER_TARGETS),
    ],
)
def test_a_manifest_that_is_not_that_of_the_logits_is_refused(logits, name, change, says):
    run_id, folder = logits
    change_json(folder.parent / name / "manifest.json", lambda m: (change(m), m)[1])
    with pytest.raises(RunError, match=says):
        load_expert_logits(run_id)


def test_a_folder_in_a_files_place_is_named(logits):
    run_id, folder = logits
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").mkdir()
    with pytest.raises(RunError, match=r"logits/manifest\.json (is no file|cannot be read)"):
        load_expert_logits(run_id)


def test_experts_can_be_told_apart(finished):
    expert = load_expert_logits(finished["ce"])
    assert expert == expert
    assert len({expert, load_expert_logits(finished["ce"])}) == 2


def test_wrong_content_is_refused_even_with_the_right_hash(logits):
    import hashlib

    run_id, folder = logits
    path = folder / "calib.npz"
    with np.load(path) as stored:
        arrays = dict(stored)
    arrays["logits"][0, 0] = np.nan
    np.savez(path, **arrays)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["calib"]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(RunError, match="expected finite float32 logits"):
        load_expert_logits(run_id)


@pytest.mark.parametrize("temperature", [-0.5, 0, float("inf")])
def test_a_temperature_that_is_none_is_refused(logits, temperature):
    run_id, folder = logits
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "temperature": temperature}))
    with pytest.raises(RunError, match="must be positive"):
        load_expert_logits(run_id)


def test_a_finished_run_whose_artifacts_are_gone_is_not_said_to_be_whole(logits, capfd):
    run_id, folder = logits
    (folder.parent / "config.yaml").unlink()
    assert main(["main", "--resume", run_id]) == 2
    assert f"error: run {run_id}: its artifacts are gone; start a new one" in capfd.readouterr().err
