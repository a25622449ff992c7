"""`mlflow models serve`, for real: images over HTTP in, the probabilities of the logits out."""

import json
import os
import urllib.error
import urllib.request

import mlflow
import numpy as np
import pytest
from reliability.servers import Server
from scipy.special import softmax

from longtail_experts import load_expert_logits
from longtail_experts.data.sources import folder_images


@pytest.fixture
def served(finished, tmp_path, monkeypatch):
    run = mlflow.MlflowClient().get_run(finished["ce"])
    uri = f"models:/{run.outputs.model_outputs[0].model_id}"
    store = os.environ["MLFLOW_TRACKING_URI"]
    server = Server(
        tmp_path,
        "models serve",
        "--model-uri",
        uri,
        "--env-manager",
        "local",
        MLFLOW_TRACKING_URI=store,
    )
    yield server
    server.stop()


def ask(url: str, body: dict) -> np.ndarray:
    request = urllib.request.Request(
        f"{url}/invocations", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return np.array(json.load(answer)["predictions"])


@pytest.mark.slow
def test_the_served_model_gives_the_probabilities_of_the_logits(served, finished, image_folder):
    expert = load_expert_logits(finished["ce"])
    split = expert.splits["test_balanced"]
    images = folder_images(image_folder).test_images[split.indices[:20]]
    scores = split.logits[:20].astype(np.float64) / expert.temperature + expert.log_offset
    train = ask(served.url, {"inputs": images.tolist(), "params": {"prior": "train"}})
    np.testing.assert_allclose(train, softmax(scores, axis=1), atol=1e-3)
    uniform = ask(served.url, {"inputs": images.tolist()})
    expected = softmax(scores - np.log(expert.prior), axis=1)
    np.testing.assert_allclose(uniform, expected, atol=1e-3)
    with pytest.raises(urllib.error.HTTPError) as refused:
        ask(served.url, {"inputs": images.tolist(), "params": {"prior": "other"}})
    assert refused.value.code == 400
    assert "prior='other': must be 'uniform' or 'train'" in refused.value.read().decode()
