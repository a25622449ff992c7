import functools
from itertools import product
from types import ModuleType

import pytest
import torch

from longtail_experts.learning import compiled as compiled_module
from longtail_experts.learning import compiled_conv as conv_module
from longtail_experts.learning import compiled_norm as norm_module
from longtail_experts.learning import compiler
from longtail_experts.learning.step import DTYPES


@pytest.fixture
def small_network():
    """Not here: the network of the experts is looked at."""


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tensors this small only lose by threads, and much where the cores are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def compiles_anew(monkeypatch):
    """What a test changes is compiled, fast, and forgotten."""
    _compile_fast(monkeypatch)
    for name in ("_begun", "_openmp_libraries_at_first"):
        _forget(monkeypatch, name, compiler)
    _forget(monkeypatch, "compiled", compiler, conv_module, norm_module)


@pytest.fixture
def compiles_one_anew(monkeypatch):
    """A source that a test puts in the place of one of ours; the other one stays as it is."""
    for module, dtype in product((norm_module, conv_module), DTYPES.values()):
        module._library(dtype)
    _compile_fast(monkeypatch)


def _compile_fast(patch: pytest.MonkeyPatch) -> None:
    patch.delenv("CXX", raising=False)
    patch.setattr(compiler, "FLAGS", ("-std=c++17", "-O0", "-fopenmp"))
    _forget(patch, "_why_not", compiled_module)
    for module in (norm_module, conv_module):
        _forget(patch, "_library", module)


def _forget(patch: pytest.MonkeyPatch, name: str, *modules: ModuleType) -> None:
    """What a function of these modules has cached, until the test ends: then it is known again."""
    anew = functools.cache(getattr(modules[0], name).__wrapped__)
    for module in modules:
        patch.setattr(module, name, anew)
