import pytest
import torch

from longtail_experts.learning import compiled as compiled_module
from longtail_experts.learning import compiled_conv as conv_module
from longtail_experts.learning import compiled_norm as norm_module
from longtail_experts.learning import compiler


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
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(compiler, "FLAGS", ("-std=c++17", "-O1", "-fopenmp"))
    forget_what_is_compiled()
    yield
    forget_what_is_compiled()


def forget_what_is_compiled() -> None:
    caches = (compiler.compiled, compiler._begun, compiler._openmp_libraries_at_first)
    caches += (compiled_module._why_not, norm_module._library, conv_module._library)
    for cache in caches:
        cache.cache_clear()
