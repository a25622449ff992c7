"""How a logged expert is opened as a pyfunc. Copied into the model, so it imports nothing of ours.

The exported program returns softmax of the scores under the uniform prior. Since these are
proportional to (posterior under the training prior) / prior, the param prior="train" is one
multiplication away.
"""

from pathlib import Path

import numpy as np
import torch
from mlflow.exceptions import MlflowException


class ServedExpert:
    def __init__(self, program, prior):
        self.program = program
        self.prior = np.asarray(prior, dtype=np.float64)

    def predict(self, model_input, params=None):
        """uint8 images [N, 32, 32, 3] -> probabilities float32 [N, C]."""
        asked = (params or {}).get("prior", "uniform")
        if asked not in ("uniform", "train"):
            raise MlflowException.invalid_parameter_value(  # the server passes its message on
                f"prior={asked!r}: must be 'uniform' or 'train'"
            )
        images = torch.from_numpy(np.ascontiguousarray(model_input, dtype=np.uint8))
        with torch.no_grad():
            probabilities = self.program(images).numpy()
        if asked == "train":
            weighted = probabilities * self.prior
            probabilities = (weighted / weighted.sum(1, keepdims=True)).astype(np.float32)
        return probabilities


def _load_pyfunc(path, model_config=None):
    program = torch.export.load(Path(path) / "model.pt2").module()
    return ServedExpert(program, model_config["prior"])
