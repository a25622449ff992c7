"""The calibrated expert as an MLflow model: uint8 images in, probabilities out."""

import contextlib
import copy
import importlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import mlflow.pytorch
import numpy as np
import torch
from mlflow.entities import LoggedModelStatus
from mlflow.models import Model, ModelSignature
from mlflow.types import ParamSchema, ParamSpec, Schema, TensorSpec
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from longtail_experts.data.batches import normalise
from longtail_experts.learning.backend import own_flags
from longtail_experts.tracking import served_expert
from longtail_experts.tracking.patience import patience, patiently
from longtail_experts.tracking.runs import EXPERT_MODEL, Run


class CalibratedExpert(nn.Module):
    """uint8 images [N, 32, 32, 3] -> softmax(f / T + log_offset - log prior), the uniform prior."""

    def __init__(self, network: nn.Module, temperature: float, log_offset: Tensor, prior: Tensor):
        super().__init__()
        self.network = network
        self.register_buffer("temperature", torch.tensor(temperature))
        self.register_buffer("shift", (log_offset - prior.log()).float())

    def forward(self, images: Tensor) -> Tensor:
        logits = self.network(normalise(images))
        return (logits / self.temperature + self.shift).softmax(1)


_programs: dict[tuple, ExportedProgram] = {}  # the last one exported of each architecture


def exported(expert: CalibratedExpert, images: Tensor) -> ExportedProgram:
    """The expert as a program, with images uint8 [2, 32, 32, 3] as its example; valid until the
    next call.

    It is traced once for all experts of one architecture: the next ones' weights, temperature and
    shift take the place of the last one's.
    """
    program = _traced(expert, images)
    program.example_inputs = ((images,), {})
    state = expert.state_dict()
    with torch.no_grad():
        for name, tensor in program.state_dict.items():
            tensor.copy_(state[name])
    return program


def _traced(expert: CalibratedExpert, images: Tensor) -> ExportedProgram:
    """The program of the expert's architecture, with the weights of whoever had it last.

    To trace takes a second or more, in which PyTorch switches cuDNN and oneDNN off and watches the
    calls of all modules: no other expert may call its own meanwhile (`own_flags`), nor trace it.
    """
    state = expert.state_dict()
    architecture = (str(expert), *((name, tensor.shape) for name, tensor in state.items()))
    with own_flags():
        if architecture not in _programs:
            _programs[architecture] = torch.export.export(
                copy.deepcopy(expert), (images,), dynamic_shapes=[{0: Dim.AUTO}]
            )
        return _programs[architecture]


# Most of the time of a first trace and of a first write; where PyTorch has other names for it, they
# import it themselves.
IMPORTED_LATE = ("mlflow.pyfunc", "torch._inductor.ir", "torch.export._trace")


def prepare_expert_model(network: nn.Module, num_classes: int) -> None:
    """Imports and trace, which `log_expert_model` else makes for the first network of an
    architecture; the network is on the CPU. For a thread that has nothing else to do."""
    network = network.to(memory_format=torch.channels_last)  # as experts come from the device
    for name in IMPORTED_LATE:  # before `own_flags`, for which others may wait
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    nothing = torch.zeros(num_classes)
    expert = CalibratedExpert(network, 1.0, nothing, nothing.exp()).eval()
    _traced(expert, torch.zeros(2, 32, 32, 3, dtype=torch.uint8))


def log_expert_model(
    run: Run,
    network: nn.Module,
    images: Tensor,
    *,
    temperature: float,
    log_offset: Tensor,
    prior: Tensor,
    step: int,
) -> None:
    """Log the expert to the run, whatever its status; images uint8 [2, 32, 32, 3] are the example.

    An exported program, so that opening it runs no pickle and needs no code of this project.
    Probabilities are float32 [N, C]. A run has one: a model that is whole already and has this
    temperature is left alone; what is left of one that was cut off, or of a calibration by other
    code, is deleted.
    """
    params = {"temperature": repr(temperature)}
    if _is_logged(run, params):
        return
    expert = CalibratedExpert(network.cpu(), temperature, log_offset, prior).eval()
    program = exported(expert, images)
    signature = ModelSignature(
        inputs=Schema([TensorSpec(np.dtype(np.uint8), (-1, *images.shape[1:]))]),
        outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, len(prior)))]),
        params=ParamSchema([ParamSpec("prior", "string", "uniform")]),
    )

    def log_whole() -> None:
        if _is_logged(run, params):
            return
        Model.log(
            artifact_path=None,
            name=EXPERT_MODEL,
            flavor=SimpleNamespace(save_model=_save_model),
            flavor_name="pytorch",
            run_id=run.run_id,
            step=step,
            params=params,
            program=program,
            pytorch_model=expert,
            signature=signature,
            input_example=images.numpy(),
            pip_requirements=_requirements(),
            code_paths=[served_expert.__file__],
            serialization_format="pt2",
            validate_serving_input=False,  # takes seconds, to open what was just written
            prior=prior.tolist(),
        )

    with run.disk_at_fault(EXPERT_MODEL):
        patiently(log_whole, patience())


def _requirements() -> list[str]:
    versions = {"torch": torch.__version__, "numpy": np.__version__, "mlflow": mlflow.__version__}
    return [f"{name}=={version.split('+')[0]}" for name, version in versions.items()]


def _is_logged(run: Run, params: Mapping[str, str]) -> bool:
    """Whether the run has the expert, with these params; one logged with others, or by half, is
    deleted."""
    for begun in run.logged_experts:
        if begun.status == LoggedModelStatus.READY and params.items() <= begun.params.items():
            return True
        run.client.delete_logged_model(begun.model_id)
    return False


def _save_model(
    path: str,
    mlflow_model: Model,
    program: ExportedProgram,
    prior: list[float],
    validate_serving_input: bool,
    **arguments,
) -> None:
    """mlflow.pytorch's own, of a program that is traced already, then a pyfunc loader that knows
    the param `prior`.

    MLflow's loader would pass params on to the exported program, which takes images alone, and
    refuses a program exported on a CPU on a machine that has a GPU.
    """
    with warnings.catch_warnings():  # of torch.export about weights that share storage; none do
        warnings.filterwarnings("ignore", message="No complete tensor found")
        # It takes a module, and has torch.export trace it; where it no longer did so this way, it
        # would trace the expert itself. And it looks through all files installed, to compare
        # requirements that are the versions at hand.
        with (
            mock.patch.object(torch.export, "export", return_value=program),
            mock.patch(
                "mlflow.utils.environment.warn_dependency_requirement_mismatches", create=True
            ),
        ):
            mlflow.pytorch.save_model(path=path, mlflow_model=mlflow_model, **arguments)
    pyfunc = mlflow_model.flavors["python_function"]
    pyfunc["loader_module"] = Path(served_expert.__file__).stem
    pyfunc["config"] = {"prior": prior}
    mlflow_model.save(str(Path(path) / "MLmodel"))
