"""Which code PyTorch's convolutions take: flags that belong to the whole process."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_flags = threading.RLock()


@contextmanager
def own_flags() -> Iterator[None]:
    """In here no other thread sets cuDNN's and oneDNN's flags, nor computes as they say, nor calls
    a network.

    A replay of a CUDA graph does not look at them. Whoever records one comes in here first.
    """
    with _flags:
        yield


@contextmanager
def exact_float32() -> Iterator[None]:
    """Convolutions on a GPU in float32 as it is written, not in TF32's ten bits of mantissa."""
    with own_flags(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield
