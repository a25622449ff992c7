"""The logged model gives the probabilities that the exported logits imply."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import importlib_metadata
import mlflow
import numpy as np
import pytest
import torch
from mlflow.entities import LoggedModelStatus
from mlflow.exceptions import MlflowException
from mlflow.utils import requirements_utils

from longtail_experts import load_expert_logits
from longtail_experts.data import batches
from longtail_experts.data.sources import folder_images
from longtail_experts.learning.backend import exact_float32
from longtail_experts.learning.resnet import build_resnet32
from longtail_experts.tracking import model as model_module
from longtail_experts.tracking import patience
from longtail_experts.tracking.model import CalibratedExpert, exported, prepare_expert_model
from longtail_experts.tracking.registry import model_id_of
from longtail_experts.tracking.runs import Run, start_run


def softmax(scores: np.ndarray) -> np.ndarray:
    e = np.exp(scores - scores.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


@pytest.fixture
def expected(finished, image_folder):
    """(images, probabilities under the uniform prior, under the training prior)."""
    expert = load_expert_logits(finished["logit_adjust"])
    split = expert.splits["test_balanced"]
    images = folder_images(image_folder).test_images[split.indices]
    scores = split.logits.astype(np.float64) / expert.temperature + expert.log_offset
    return images, softmax(scores - np.log(expert.prior)), softmax(scores)


@pytest.fixture
def model_uri(finished) -> str:
    run = mlflow.MlflowClient().get_run(finished["logit_adjust"])
    (output,) = run.outputs.model_outputs
    return f"models:/{output.model_id}"


def test_pyfunc_gives_both_priors(model_uri, expected):
    images, uniform, train = expected
    model = mlflow.pyfunc.load_model(model_uri)
    np.testing.assert_allclose(model.predict(images), uniform, atol=1e-4)
    np.testing.assert_allclose(model.predict(images, {"prior": "uniform"}), uniform, atol=1e-4)
    np.testing.assert_allclose(model.predict(images, {"prior": "train"}), train, atol=1e-4)
    np.testing.assert_allclose(model.predict(images[:1]), uniform[:1], atol=1e-4)
    assert np.abs(uniform - train).max() > 0.01
    with pytest.raises(MlflowException, match="must be 'uniform' or 'train'"):
        model.predict(images[:2], {"prior": "other"})


def test_what_is_traced_once_serves_every_expert_of_its_architecture(monkeypatch):
    """Also where no image was normalised before, as on a GPU, where all images are."""
    monkeypatch.setattr(model_module, "_programs", {})
    batches._mean_and_std.cache_clear()
    heads, random = ("linear", "cosine", "linear", "cosine"), torch.Generator().manual_seed(0)
    for seed, head in enumerate(heads):
        images, others = torch.randint(256, (2, 3, 32, 32, 3), dtype=torch.uint8, generator=random)
        temperature, offset = 0.7 + seed, torch.randn(5, generator=random)
        prior = torch.rand(5, generator=random)
        network = build_resnet32(5, "pad", seed, head).eval()
        expert = CalibratedExpert(network, temperature, offset, prior).eval()
        program = exported(expert, images)
        assert torch.equal(program.example_inputs[0][0], images)
        logits = network(batches.normalise(others))
        expected = (logits / temperature + (offset - prior.log())).softmax(1)
        torch.testing.assert_close(program.module()(others), expected)
    assert len(model_module._programs) == 2


def test_a_model_that_is_prepared_for_is_not_traced_again(monkeypatch):
    """Nor at the same time: who needs it waits for it."""
    export, traced, begun = torch.export.export, [], threading.Event()

    def trace(*arguments, **settings):
        traced.append(threading.current_thread())
        begun.set()
        time.sleep(0.05)
        return export(*arguments, **settings)

    monkeypatch.setattr(model_module, "_programs", {})
    monkeypatch.setattr(torch.export, "export", trace)
    network = build_resnet32(5, "pad", 0)
    other = threading.Thread(target=prepare_expert_model, args=(network, 5))
    other.start()
    assert begun.wait(60)
    prior, images = torch.rand(5) + 0.1, torch.randint(256, (2, 32, 32, 3), dtype=torch.uint8)
    expert = CalibratedExpert(build_resnet32(5, "pad", 1), 2.0, torch.randn(5), prior).eval()
    program = exported(expert, images)
    other.join()
    assert traced == [other]
    torch.testing.assert_close(program.module()(images), expert(images))


def test_no_other_thread_computes_while_one_is_traced(monkeypatch):
    """torch.export switches the code that its convolutions take."""
    export, computes = torch.export.export, threading.Event()

    def compute():
        with exact_float32():
            computes.set()

    def trace(*arguments, **settings):
        other.start()
        assert not computes.wait(0.1)
        return export(*arguments, **settings)

    other = threading.Thread(target=compute)
    monkeypatch.setattr(model_module, "_programs", {})
    monkeypatch.setattr(torch.export, "export", trace)
    expert = CalibratedExpert(build_resnet32(5, "pad", 0), 1.0, torch.zeros(5), torch.ones(5) / 5)
    exported(expert.eval(), torch.zeros(2, 32, 32, 3, dtype=torch.uint8))
    assert computes.wait(60)
    other.join()


def test_pytorch_flavour(model_uri, expected):
    images, uniform, _ = expected
    program = mlflow.pytorch.load_model(model_uri)
    with torch.no_grad():
        np.testing.assert_allclose(program(torch.from_numpy(images)), uniform, atol=1e-4)


def test_signature_and_example(model_uri):
    info = mlflow.models.get_model_info(model_uri)
    assert info.signature.inputs.inputs[0].type == np.uint8
    assert info.signature.inputs.inputs[0].shape == (-1, 32, 32, 3)
    assert info.signature.outputs.inputs[0].shape == (-1, 5)
    assert [p.name for p in info.signature.params] == ["prior"]
    assert info.saved_input_example_info is not None


def test_the_model_opens_without_this_project(model_uri, expected, tmp_path):
    """As on another machine: a copy of its folder, and no longtail_experts to import."""
    images, uniform, _ = expected
    folder = mlflow.artifacts.download_artifacts(model_uri, dst_path=str(tmp_path / "copy"))
    np.save(tmp_path / "images.npy", images[:4])
    code = (
        "import sys; sys.modules['longtail_experts'] = None\n"
        "import mlflow, numpy as np\n"
        f"model = mlflow.pyfunc.load_model({folder!r})\n"
        f"np.save('probabilities.npy', model.predict(np.load('images.npy')))\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=120)
    np.testing.assert_allclose(np.load(tmp_path / "probabilities.npy"), uniform[:4], atol=1e-4)


def log_small_model(run: Run, temperature: float = 1.0) -> None:
    model_module.log_expert_model(
        run,
        build_resnet32(5, "pad", 0).eval(),
        torch.zeros(2, 32, 32, 3, dtype=torch.uint8),
        temperature=temperature,
        log_offset=torch.zeros(5),
        prior=torch.ones(5) / 5,
        step=0,
    )


def test_a_model_of_another_temperature_is_replaced(store):
    """The calibration was cut off after it, and gone on with by other code."""
    with start_run("a", {}) as run:
        seen = []
        for temperature in (1.5, 1.5, 2.0):
            log_small_model(run, temperature)
            (logged,) = run.logged_experts
            seen.append((logged.model_id, logged.params["temperature"]))
    assert seen[0] == seen[1]
    assert seen[1][0] != seen[2][0]
    assert seen[2][1] == "2.0"


@pytest.mark.parametrize("name", ["rejector", "expert"])
def test_a_model_that_someone_else_logged_into_the_run_stays(store, name):
    """A rejector on top of the expert, say; and it is not registered as the expert."""
    with start_run("a", {}) as run:
        client = mlflow.MlflowClient()
        where = {"experiment_id": run.experiment_id, "source_run_id": run.run_id}
        theirs = [client.create_logged_model(name=name, **where)]
        log_small_model(run)
        theirs.append(client.create_logged_model(name=name, **where))
        client.finalize_logged_model(theirs[-1].model_id, LoggedModelStatus.READY)
        log_small_model(run)  # as `calibrate` does where it was cut off after it
    (logged,) = run.logged_experts
    assert logged.params["temperature"] == "1.0"
    assert model_id_of(run) == logged.model_id
    assert all(client.get_logged_model(model.model_id) for model in theirs)


def test_what_is_installed_is_not_looked_through(store, monkeypatch):
    """MLflow would, for a second or two, to compare requirements that are the versions at hand."""
    looked = []
    monkeypatch.setattr(requirements_utils, "_MODULES_TO_PACKAGES", None)
    monkeypatch.setattr(importlib_metadata, "packages_distributions", lambda: looked.append(1))
    with start_run("a", {}) as run:
        log_small_model(run)
        (logged,) = run.logged_experts
    assert looked == []
    named = mlflow.pyfunc.get_model_dependencies(f"models:/{logged.model_id}")
    assert f"torch=={torch.__version__.split('+')[0]}" in Path(named).read_text().split()


def test_a_model_is_logged_once_the_store_is_back(store, monkeypatch):
    monkeypatch.setattr(patience, "FIRST_PAUSE", 0.01)
    log, left = model_module.Model.log, [2]

    def away(**arguments):
        if left[0]:
            left[0] -= 1
            raise MlflowException("API request to /logged-models failed with exception: refused")
        return log(**arguments)

    with monkeypatch.context() as patch, start_run("a", {}) as run:
        patch.setattr(model_module.Model, "log", away)
        log_small_model(run)
    assert left == [0]
    (logged,) = run.logged_experts
    assert logged.status == LoggedModelStatus.READY
