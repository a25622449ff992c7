import pytest
import torch


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
