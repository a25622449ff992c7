"""Training steps and forward passes that are recorded once and replayed: on a GPU, as CUDA graphs.

A step of a ResNet-32 is some 640 kernels of a few microseconds; starting them one by one takes
longer than they do. A graph starts all at once: loading the batch, forward and backward pass and
update. It reads and writes fixed memory, so batch and learning rate are copied into place before
each replay; weights, momentum and batch norm's statistics are where they always were.

Nothing here knows what a step is. Tests on a CPU run the same code with a recorder that calls the
step again where CUDA would replay it.
"""

import copy
import gc
import math
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from longtail_experts.learning.backend import own_flags
from longtail_experts.learning.fused import Kernels, fused, fusible, require_same_layers

WARM_UP = 3  # steps before a recording, in which libraries choose kernels and allocate
CHECK_LR = 0.01  # small enough for any state to survive a step of the check

# How far a replayed step may be from the plain one. Rounding alone gave up to 5e-7 and 0.02 in fp32
# (two memory orders of one batch on a CPU), 7e-4 and 0.4 in bf16 (fused kernels beside plain ones;
# 0.29 to 0.67 with the initial weights of 23 seeds and what these kernels round, on a CPU).
# An update left out, taken twice or at another rate is 1 away.
LOSS_APART = {"fp32": 1e-4, "bf16": 1e-2}  # relative; below 1 in nats: rounding moves logits
APART = {"fp32": 0.05, "bf16": 0.7}  # of any tensor, by `how_far_apart`

# Forward passes of one size before one is recorded. A recording takes six passes and waits for the
# whole GPU; of images enough to keep that busy, a replay saves no more than the calls: an estimate.
RECORD_AFTER = 60
LOGITS_APART = 1e-4  # relative, lengths as in Euclid; rounding gives some 1e-6

Batch = tuple[Tensor | tuple[Tensor, ...], ...]
Step = Callable[[Any, Batch, float | Tensor], Tensor]  # (state, batch, lr) -> loss, on the device
Recorder = Callable[[Callable[[], None]], Callable[[], Any]]  # what to do -> to do it once more


class CannotRecordError(RuntimeError):
    """No recording could be made, or it does something else; the message says why."""


# Whoever records waits for the whole device first, which none may while another records; and some
# versions of PyTorch (2.11) refuse to replay meanwhile.
_recording = threading.Lock()
# Graphs whose capture failed: PyTorch (2.11) asks them about every allocation from then on.
_refused: list[torch.cuda.CUDAGraph] = []


def cuda_graphs() -> Recorder:
    """A recorder of CUDA graphs. They share memory: no two of one recorder may run at once.

    One thread of the process records at a time. Graphs of other recorders, replayed on streams of
    their own, run beside each other and beside a recording; none is started during one.
    """
    stream, pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def record(run: Callable[[], None]) -> Callable[[], None]:
        ours = torch.cuda.current_stream()
        stream.wait_stream(ours)
        try:
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    run()
        finally:  # whoever puts the state back after a failure comes after these steps
            ours.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with own_flags(), _recording:
            try:
                with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
                    run()
            except BaseException:
                _refused.append(graph)
                raise
            finally:
                torch.cuda.set_stream(ours)  # older PyTorch leaves its own after a failure

        def replay() -> None:
            with _recording:
                graph.replay()

        return replay

    return record


class Recording(NamedTuple):
    batch: Batch  # what a replay reads, beside the learning rate
    loss: Tensor  # what it writes, beside the state
    replay: Callable[[], Any]
    step: Step  # keeps what else it reads in memory: a graph knows addresses alone


class RecordedSteps:
    """The steps of one training, a recording for each size of batch.

    A recording is of one kind of step on one model and its momenta: with another, all are made
    anew. Values may be loaded into parameters between any two steps.
    """

    def __init__(self, make_recorder: Callable[[], Recorder] = cuda_graphs, fuses: bool = False):
        self._make_recorder = make_recorder
        self._fuses = fuses  # until that has failed
        self.is_fused = False  # whether the newest recording is
        self._forget()

    def _forget(self) -> None:
        self._recorder: Recorder | None = None
        self._recordings: dict[Any, Recording] = {}
        self._lr: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "RecordedSteps":
        # A copied state lies elsewhere in memory.
        return RecordedSteps(self._make_recorder, self._fuses)

    def take(
        self, state: Any, batch: Batch, lr: float, step: Step, *, kind: tuple, precision: str
    ) -> Tensor:
        """What `step(state, batch, lr)` does and returns; CannotRecordError, with `state` as it
        was, where a recording does not do that.

        kind: what decides what `step` does, beside its arguments.
        """
        if self._recordings and not self._still_hold(state, kind):
            self._forget()
        self._kind = kind
        size = tuple((values.shape, values.dtype) for values in _flat(batch))
        if size not in self._recordings:
            self._recordings[size] = self._record(state, batch, step, precision)
        recording, count = self._recordings[size], state.step
        _fill(recording.batch, batch)
        self._lr.fill_(lr)
        try:
            recording.replay()
        except RuntimeError as error:  # then nothing has begun to run
            raise CannotRecordError(_reason(error)) from error
        state.step = count + 1
        return recording.loss.clone()

    def _still_hold(self, state: Any, kind: tuple) -> bool:
        model, momentum = self._memory
        is_there = model is state.model and momentum is _a_momentum(state)
        return is_there and _is_same(kind, self._kind)

    def _record(self, state: Any, batch: Batch, step: Step, precision: str) -> Recording:
        """A recording that was compared with the step itself; `state` is left as it was.

        Of the kernels written for this network, where they are asked for and can run; else of
        PyTorch's. One thread at a time: Triton's kernels are loaded here, which is not made for
        more.
        """
        with own_flags():
            if self._fuses and fusible(state.model):
                try:
                    return self._record_with(fused, state, batch, step, precision)
                except CannotRecordError as error:
                    self._fuses = False
                    warnings.warn(f"kernels are not fused, and slower: {error}", stacklevel=4)
                self._forget()  # other sizes too: all steps by one path
                gc.collect()  # what failed holds its step's graph, as in `_copies`: maybe a cycle
            return self._record_with(nullcontext, state, batch, step, precision)

    def _record_with(
        self, kernels: Kernels, state: Any, batch: Batch, step: Step, precision: str
    ) -> Recording:
        with left_as_it_was(state):
            self._memory = (state.model, _a_momentum(state))
            try:
                device = next(state.model.parameters()).device
                if self._recorder is None:
                    self._recorder = self._make_recorder()
                    self._lr = torch.zeros((), device=device)
                lr, loss = self._lr.zero_(), torch.zeros((), device=device)
                own = _first_half_twice(batch)

                def run() -> None:
                    with kernels(state.model), _rate_in_memory(state.optimizer):
                        loss.copy_(step(state, own, lr))

                if kernels is fused:
                    require_same_layers(state.model, lambda: step(state, own, 0.0))
                recording = Recording(own, loss, self._recorder(run), step)
                lr.fill_(CHECK_LR)
                require_same_step(state, batch, step, recording, precision)
            except Exception as error:  # whatever a driver, a library or a capture raises
                raise CannotRecordError(_reason(error)) from error
        self.is_fused = kernels is fused
        return recording


class RecordedPasses:
    """Forward passes of a model in evaluation, in float32: after RECORD_AFTER batches of a size, a
    recording takes the rest.

    Recordings are of one model, and made anew for another. Values may be loaded into its parameters
    between any two passes.
    """

    def __init__(self, make_recorder: Callable[[], Recorder] = cuda_graphs):
        self._make_recorder = make_recorder
        self._is_refused = False
        self._forget(None)

    def _forget(self, model: nn.Module | None) -> None:
        self._model = model
        self._recorder: Recorder | None = None
        self._seen: Counter[torch.Size] = Counter()
        self._recordings: dict[torch.Size, RecordedPass] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "RecordedPasses":
        return RecordedPasses(self._make_recorder)  # a copied model lies elsewhere in memory

    def take(self, model: nn.Module, images: Tensor) -> Tensor:
        """`model(images)`. Where that cannot be recorded, one warning says why, and passes are
        plain from then on."""
        if model is not self._model:
            self._forget(model)
        self._seen[images.shape] += 1
        if self._is_refused or self._seen[images.shape] <= RECORD_AFTER:
            return model(images)
        try:
            if images.shape not in self._recordings:
                self._recordings[images.shape] = self._record(model, images)
            return self._recordings[images.shape].take(images)
        except Exception as error:  # whatever a driver, a library or a capture raises
            self._is_refused = True
            why = _reason(error)
            warnings.warn(f"forward passes are not replayed, and slower: {why}", stacklevel=3)
            return model(images)

    def _record(self, model: nn.Module, images: Tensor) -> "RecordedPass":
        if self._recorder is None:
            self._recorder = self._make_recorder()
        expected = model(images)
        own, logits = torch.zeros_like(images), torch.empty_like(expected)
        recording = RecordedPass(own, logits, self._recorder(lambda: logits.copy_(model(own))))
        apart = float((recording.take(images) - expected).norm() / expected.norm())
        if not apart <= LOGITS_APART:
            raise CannotRecordError(
                f"replayed logits are {apart:.2g} of their length away from plain ones (at most "
                f"{LOGITS_APART:g})"
            )
        return recording


class RecordedPass(NamedTuple):
    images: Tensor  # what a replay reads, beside the model
    logits: Tensor  # what it writes
    replay: Callable[[], Any]

    def take(self, images: Tensor) -> Tensor:
        self.images.copy_(images)
        self.replay()
        return self.logits.clone()


def require_same_step(
    state: Any, batch: Batch, step: Step, recording: Recording, precision: str
) -> None:
    """CannotRecordError unless a replay does to `state` what `step` does to a copy of it.

    Called after the warm-up: momentum is not zero, and a forgotten one shows. What is wrong is so
    on a second batch too; rounding alone takes a tensor too far on one of a hundred.
    """
    for one in (batch, _without_the_first_quarter(batch)):
        _fill(recording.batch, one)
        with left_as_it_was(state):
            apart = _apart_on(state, one, step, recording, precision)
        if apart <= APART[precision]:
            return
        if math.isnan(apart):
            break
    raise CannotRecordError(
        f"a replayed step is {apart:.2g} of its change away from a plain one (at most "
        f"{APART[precision]:g})"
    )


def _apart_on(state: Any, batch: Batch, step: Step, recording: Recording, precision: str) -> float:
    plain = copy.deepcopy(state)
    before = _copies(tensors_of(plain))
    expected = float(step(plain, batch, CHECK_LR))
    recording.replay()
    found = float(recording.loss)
    if not abs(found - expected) <= LOSS_APART[precision] * max(1.0, abs(expected)):
        raise CannotRecordError(f"a replayed step has loss {found:.6g}, a plain one {expected:.6g}")
    return how_far_apart(tensors_of(state), tensors_of(plain), before)


@torch.no_grad()
def how_far_apart(ours: list[Tensor], theirs: list[Tensor], before: list[Tensor]) -> float:
    """The largest of all tensors: how much of their change is missing from ours, or too much,
    along their change; or half of what ours is away from theirs, where that is more.

    Both as shares of the length of their change, lengths as in Euclid: rounding, which has no
    direction, shows little along it. Changes below float32's rounding of the tensor itself do not
    count.
    """
    found = []
    for our, their, old in zip(ours, theirs, before, strict=True):
        our, their, old = our.double(), their.double(), old.double()
        change, off = their - old, our - their
        length = change.norm() + 1e-6 * their.norm() + 1e-12
        found += [(off * change).sum().abs() / length**2, off.norm() / length / 2]
    return float(torch.stack(found).max())  # of NaN, NaN


def make_momenta(optimizer: torch.optim.SGD) -> None:
    """Zeros where the first step would make them: the same step, without its special case."""
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            values = optimizer.state[parameter]
            if values.get("momentum_buffer") is None:
                values["momentum_buffer"] = torch.zeros_like(parameter)


@contextmanager
def left_as_it_was(state: Any) -> Iterator[None]:
    """Of steps taken in here nothing remains, but momenta of zero where there were none."""
    make_momenta(state.optimizer)
    tensors, count = tensors_of(state), state.step
    before = _copies(tensors)
    try:
        yield
    finally:
        with torch.no_grad():
            for values, value in zip(tensors, before, strict=True):
                values.copy_(value)
        state.step = count
        state.optimizer.zero_grad(set_to_none=True)  # gradients may lie in a graph's memory


def _copies(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Without a graph: one would hold the nodes that gather the parameters' gradients, and those
    the stream that they were made on, which a step recorded on another must not touch."""
    return [values.detach().clone() for values in tensors]


def tensors_of(state: Any) -> list[Tensor]:
    """All that a step changes: parameters, batch norm's statistics, momenta."""
    momenta = [values["momentum_buffer"] for values in state.optimizer.state.values()]
    return [*state.model.parameters(), *state.model.buffers(), *filter(torch.is_tensor, momenta)]


def _a_momentum(state: Any) -> Tensor | None:
    """Stands for all of them: load_state_dict replaces all."""
    parameter = state.optimizer.param_groups[0]["params"][0]
    return state.optimizer.state.get(parameter, {}).get("momentum_buffer")


@contextmanager
def _rate_in_memory(optimizer: torch.optim.SGD) -> Iterator[None]:
    """In here the update reads the learning rate where it runs; groups are left as they were.

    On a GPU, of PyTorch's updates the fused one does; the default would wait to read it here.
    """
    before = [(group["lr"], group["fused"]) for group in optimizer.param_groups]
    try:
        for group in optimizer.param_groups:
            if group["params"][0].is_cuda:
                group["fused"] = True
        yield
    finally:
        for group, (lr, fused) in zip(optimizer.param_groups, before, strict=True):
            group["lr"], group["fused"] = lr, fused


def _is_same(ours: Any, theirs: Any) -> bool:
    """Of tuples and partials, whether all parts are; of tensors, whether values are; else identity.

    An objective is a new partial each epoch, of the same function and the same terms.
    """
    if ours is theirs:
        return True
    if isinstance(ours, tuple) and isinstance(theirs, tuple):
        return len(ours) == len(theirs) and all(map(_is_same, ours, theirs))
    if isinstance(ours, partial) and isinstance(theirs, partial):
        parts = ((p.func, p.args, *p.keywords.items()) for p in (ours, theirs))
        return _is_same(*parts)
    if torch.is_tensor(ours) and torch.is_tensor(theirs):
        return torch.equal(ours, theirs)
    return bool(ours == theirs)


def _reason(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__


def _flat(batch: Batch) -> Iterator[Tensor]:
    for part in batch:
        yield from part if isinstance(part, tuple) else (part,)


def _of_each(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    return tuple(
        _of_each(part, change) if isinstance(part, tuple) else change(part) for part in batch
    )


def _first_half_twice(batch: Batch) -> Batch:
    """A batch of the same shapes in memory of its own, which the check then fills: what depends
    on the values that were there at the recording does not pass it."""

    def half_twice(values: Tensor) -> Tensor:
        if values.dim() == 0 or len(values) < 2:
            return values.clone()
        half = (len(values) + 1) // 2
        return torch.cat([values[:half], values[: len(values) - half]])

    return _of_each(batch, half_twice)


def _without_the_first_quarter(batch: Batch) -> Batch:
    """Other images, as many, and again not those that the recording saw: the second quarter stands
    in for the first."""

    def without(values: Tensor) -> Tensor:
        quarter = len(values) // 4 if values.dim() else 0
        return torch.cat([values[quarter:], values[quarter : 2 * quarter]]) if quarter else values

    return _of_each(batch, without)


def _fill(own: Batch, batch: Batch) -> None:
    for into, values in zip(_flat(own), _flat(batch), strict=True):
        if values.numel():  # most augmentations are off: a call for each, in every step
            into.copy_(values)
