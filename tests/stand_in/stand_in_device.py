"""A device for machines that have no GPU: tensors on it are apart from those of the CPU, as PyTorch
sees them, and the CPU computes underneath.

Mixing the two raises, as with a GPU. `torch.standin` has what this project calls in `torch.cuda`;
a graph holds the operators that ran while it was captured, and the memory they read and wrote; a
replay runs them again. Reading a value back, or copying to or from the CPU, raises meanwhile.

PyTorch's hook for devices in Python is experimental, so this is for tests alone.
"""

import threading
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "standin"
_libraries = []
_aliases = []  # memory that two tensors share stays, or autograd would add in place to both


class Capture:
    """The one under way, if any: by which thread, and [(operator, arguments, named, results)]."""

    thread: int | None = None


def is_on_it(x) -> bool:
    return isinstance(x, torch.Tensor) and x.device.type == NAME


def inner(x: torch.Tensor) -> torch.Tensor:
    return x.untyped_storage().inner


def outer(values: torch.Tensor) -> torch.Tensor:
    made = torch._C._acc.create_empty_tensor(tuple(values.shape), values.dtype)
    made.untyped_storage().inner = values
    return made


def shares_memory(x: torch.Tensor, y: torch.Tensor) -> bool:
    return x.numel() > 0 and x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr()


def run(operator, *arguments, **named):
    """`operator` on the memory underneath."""
    name = operator.name()
    tensors = [x for x in tree_leaves((arguments, named)) if isinstance(x, torch.Tensor)]
    ours = [x for x in tensors if is_on_it(x)]
    theirs = [x for x in tensors if not is_on_it(x)]
    is_copy = "copy" in name
    if not is_copy and ours and any(x.dim() for x in theirs):
        raise RuntimeError(f"{name}: tensors on {NAME} and on the CPU")
    records = _records_here()
    if records and (name.startswith("aten::_local_scalar_dense") or (is_copy and theirs)):
        raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
    by_inner = {id(inner(x)): x for x in ours}

    def to_inner(x):
        if isinstance(x, torch.device):
            return torch.device("cpu") if x.type == NAME else x
        return inner(x) if is_on_it(x) else x

    def to_outer(x):
        if not isinstance(x, torch.Tensor) or id(x) in by_inner:
            return by_inner.get(id(x), x)
        made = outer(x)
        if any(shares_memory(x, inner(y)) for y in ours):
            _aliases.extend(y.untyped_storage() for y in (made, *ours))
        return made

    arguments, named = tree_map(to_inner, arguments), tree_map(to_inner, named)
    with torch.no_grad():
        result = operator(*arguments, **named)
    if records:
        Capture.operators.append((operator, arguments, named, result))
    for x in ours:
        if inner(x).shape != x.shape:
            raise NotImplementedError(f"{name} changes a shape: give it an implementation here")
    return tree_map(to_outer, result)


def run_view(operator, *arguments, **named):
    """Of parameters, a view is no inference tensor in inference mode either."""
    with torch.inference_mode(arguments[0].is_inference()):
        return run(operator, *arguments, **named)


def copy_from(values, into, non_blocking=False):
    run(torch.ops.aten.copy_.default, into, values)
    return into


def make(operator, *arguments, device=None, **named):
    return run(operator, *arguments, **named)


def update(parameters, gradients, momenta, **named):
    """As _fused_sgd_, which on the CPU asks for one memory order of all three."""
    operator = torch.ops.aten._fused_sgd_.tensor_lr
    fresh = [
        [run(torch.ops.aten.clone.default, x) for x in values] for values in (gradients, momenta)
    ]
    for values, like in zip(zip(*fresh, strict=True), parameters, strict=True):
        for x in values:
            ordered = torch.empty_like(inner(like)).copy_(inner(x))
            if _records_here():
                Capture.operators.append((ordered.copy_, (inner(x),), {}, ordered))
            x.untyped_storage().inner = ordered
    run(operator, parameters, *fresh, **named)
    for into, values in zip(momenta, fresh[1], strict=True):
        copy_from(values, into)


def convolution(images, weight, bias, *settings):
    return run(torch.ops.aten.convolution.default, images, weight, bias, *settings)


def convolution_backward(gradient, images, weight, *settings):
    *settings, (of_images, of_weight, _) = settings
    operator, mask = torch.ops.aten.convolution_backward.default, [of_images, of_weight, False]
    return run(operator, gradient, images, weight, None, *settings, mask)


# PyTorch's own would change the shape of an empty result, or read strides of memory that is not it.
FACTORIES = ("arange", "arange.start", "arange.start_step", "linspace", "randperm", "full")
PLAIN = ("abs", "isfinite", "index.Tensor")
VIEWS = (
    *("transpose.int", "t", "permute", "expand", "select.int", "slice.Tensor", "unsqueeze"),
    *("squeeze", "squeeze.dim", "squeeze.dims", "view", "_unsafe_view", "_reshape_alias"),
    *("split.Tensor", "split_with_sizes", "unbind.int"),
)


# --- what torch.cuda has ----------------------------------------------------------------------


class Module:
    """`torch.standin`."""

    _lazy_init = get_rng_state_all = list
    is_available = staticmethod(lambda: True)
    is_initialized = staticmethod(lambda: True)
    _is_in_bad_fork = staticmethod(lambda: False)
    device_count = staticmethod(lambda: 1)
    current_device = staticmethod(lambda: 0)
    get_device_name = staticmethod(lambda: NAME)
    device = staticmethod(lambda _: nullcontext())
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16])
    mem_get_info = staticmethod(lambda: (10**11, 10**11))
    max_memory_reserved = staticmethod(lambda: 10**9)
    set_rng_state_all = staticmethod(lambda states: None)
    manual_seed_all = staticmethod(lambda seed: None)
    set_stream = staticmethod(lambda stream: None)
    stream = staticmethod(nullcontext)

    @staticmethod
    @contextmanager
    def graph(graph, pool, stream, capture_error_mode):
        assert Capture.thread is None, "two captures at once"
        Capture.thread, Capture.operators = threading.get_ident(), []
        try:
            yield
            graph.operators = Capture.operators
        finally:
            Capture.thread = None


class Stream:
    def wait_stream(self, other) -> None:
        pass


class Graph:
    def replay(self) -> None:
        assert Capture.thread is None, "a replay beside a capture"
        with torch.no_grad():
            for operator, arguments, named, result in self.operators:
                again = operator(*arguments, **named)
                for into, values in zip(tree_leaves(result), tree_leaves(again), strict=True):
                    if isinstance(into, torch.Tensor) and not shares_memory(into, values):
                        into.copy_(values)


Module.Stream = Module.graph_pool_handle = Module.current_stream = Stream
Module.CUDAGraph = Graph


def _records_here() -> bool:
    """In the thread that captures, and in those of autograd, which are not Python's."""
    if Capture.thread is None:
        return False
    here = threading.current_thread()
    return here.ident == Capture.thread or isinstance(here, threading._DummyThread)


def install() -> None:
    """Once a process."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=Module())
    everything, aten = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    everything.fallback(run, "PrivateUse1")
    for names, how in ((FACTORIES, make), (PLAIN, run), (VIEWS, run_view)):
        for name in names:
            packet, _, overload = name.partition(".")
            operator = getattr(getattr(torch.ops.aten, packet), overload or "default")
            aten.impl(name, partial(how, operator), "PrivateUse1")
    for name, kernel in {
        "_copy_from": copy_from,
        "convolution_overrideable": convolution,
        "convolution_backward_overrideable": convolution_backward,
        "_fused_sgd_.tensor_lr": update,
    }.items():
        aten.impl(name, kernel, "PrivateUse1")
    _libraries.extend((everything, aten))  # which would otherwise take all back
    deep_copy, reduce = torch.Tensor.__deepcopy__, torch.Tensor.__reduce_ex__

    def copied(x, memo):
        if not is_on_it(x):
            return deep_copy(x, memo)
        return memo.setdefault(id(x), x.detach().clone().requires_grad_(x.requires_grad))

    def reduced(x, protocol):
        return reduce(x.detach().cpu() if is_on_it(x) else x, protocol)

    torch.Tensor.__deepcopy__, torch.Tensor.__reduce_ex__ = copied, reduced
