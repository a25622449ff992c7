from collections.abc import Iterator

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
    yield from compiles_fast(
        monkeypatch, compiler.compiled, compiler._begun, compiler._openmp_libraries_at_first
    )


@pytest.fixture
def compiles_one_anew(monkeypatch):
    """A source that a test puts in the place of one of ours; the other one stays as it is."""
    for dtype in DTYPES.values():
        norm_module._library(dtype)
    conv_module._library()
    yield from compiles_fast(monkeypatch)


def compiles_fast(patch: pytest.MonkeyPatch, *caches) -> Iterator[None]:
    patch.delenv("CXX", raising=False)
    patch.setattr(compiler, "FLAGS", ("-std=c++17", "-O0", "-fopenmp"))
    caches += (compiled_module._why_not, norm_module._library, conv_module._library)
    forget(caches)
    yield
    forget(caches)


def forget(caches) -> None:
    for cache in caches:
        cache.cache_clear()
