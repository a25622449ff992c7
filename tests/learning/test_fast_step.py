"""Recorded steps equal plain ones, and are not taken where they do not.

On a CPU the recorder calls the step again where a GPU would replay a graph of it: everything else
is the code that runs there.
"""

import copy
import functools
import gc
import os
import re
import subprocess
import sys
import warnings
import weakref
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from longtail_experts.data import batches
from longtail_experts.data.batches import batches_of, draw_epoch, load_batch, loader_of
from longtail_experts.learning import fast_step
from longtail_experts.learning.at_once import at_once, beside_the_others
from longtail_experts.learning.fast_step import (
    WARM_UP,
    CannotRecordError,
    RecordedPasses,
    RecordedSteps,
    how_far_apart,
    left_as_it_was,
    make_momenta,
    tensors_of,
)
from longtail_experts.learning.losses import LOSSES, Knobs, objective_of, shifted_cross_entropy
from longtail_experts.learning.resnet import ResNet32, build_resnet32
from longtail_experts.learning.step import (
    NonFiniteLossError,
    TrainState,
    predict_logits,
    start_training,
    train_epoch,
    train_step,
)

NUM_CLASSES, NUM_IMAGES, BATCH = 5, 50, 16  # batches of 16, 16, 16 and 2
COUNTS = torch.tensor([20, 12, 9, 6, 3])


def call_again():
    """A recorder for a machine without CUDA: what it is given runs as often as there, and what it
    does in Python shows as little."""

    def record(run):
        for _ in range(WARM_UP):
            run()
        return partial(replay, run)

    def replay(run):
        steps = [state.step for state in started]
        run()
        for state, step in zip(started, steps, strict=True):
            state.step = step

    return record


started: list[TrainState] = []


@pytest.fixture(autouse=True)
def _none_started():
    started.clear()


def tiny() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, NUM_CLASSES),
        )


def resnet() -> nn.Module:
    return build_resnet32(NUM_CLASSES, "pad", seed=0)


def start(build=tiny, make_recorder=call_again, device="cpu", fuses=False, **changes) -> TrainState:
    settings = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3, "precision": "fp32", **changes}
    state = start_training(build(), **settings, device=device, fast=False)
    state.recorded = make_recorder and RecordedSteps(make_recorder, fuses)
    started.append(state)
    return state


def objective(epoch: int, device: str = "cpu"):
    """As a stage asks for it: a new object each epoch, of other weights from epoch 2 on."""
    return objective_of("ldam_drw", COUNTS, Knobs(beta=0.9), device, is_reweighted=epoch >= 2)


def images(device: str = "cpu") -> partial:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (NUM_IMAGES, 8, 8, 3), dtype=torch.uint8, generator=generator)
    targets = torch.arange(NUM_IMAGES) % NUM_CLASSES
    return loader_of(pixels, targets, device)


def train(state, epochs=range(13), load=None, objective=objective, lr=0.2, precision="fp32"):
    """Mean losses of the epochs, at a rate that falls with every step."""
    load = load or images()
    device = load.args[0].device.type
    return [
        train_epoch(
            state,
            batches_of(draw_epoch(NUM_IMAGES, 1, epoch, device), BATCH),
            objective=objective(epoch, device),
            lr_at=lambda step: lr / (1 + step),
            precision=precision,
            load=load,
        )
        for epoch in epochs
    ]


def same(ours: TrainState, theirs: TrainState) -> bool:
    pairs = list(zip(tensors_of(ours), tensors_of(theirs), strict=True))
    return ours.step == theirs.step and all(torch.equal(x, y) for x, y in pairs)


# --- the same as plain steps ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "changes", "epochs"),
    [
        (tiny, {}, 13),
        (tiny, {"momentum": 0.0, "weight_decay": 0.0}, 13),
        (tiny, {"precision": "bf16"}, 13),
        (resnet, {}, 3),
    ],
)
def test_recorded_steps_equal_plain_ones_bit_for_bit(build, changes, epochs):
    """52 steps, with a short batch in every epoch, a rate a step and new weights in epoch 2."""
    precision = changes.get("precision", "fp32")
    plain, recorded = start(build, None, **changes), start(build, **changes)
    expected = train(plain, range(epochs), precision=precision)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert train(recorded, range(epochs), precision=precision) == expected
    assert recorded.path == "graph"
    assert plain.path == "plain"
    assert same(recorded, plain)
    assert recorded.step == 4 * epochs


def test_the_change_of_objective_is_one_that_shows():
    """Else the test above would pass where the old recording went on."""
    late, never = (start(tiny, None) for _ in range(2))
    train(late, range(3))
    train(never, range(3), objective=lambda _, device: objective(0, device))
    assert not same(late, never)


def test_batches_that_are_loaded_already_may_hold_tuples():
    """As mixup's: the targets of both, and one share, a scalar."""

    def mixed(logits, targets):
        own, partners, share = targets
        return share * loss(logits, own) + (1 - share) * loss(logits, partners)

    loss = partial(shifted_cross_entropy, shift=torch.zeros(NUM_CLASSES))
    generator = torch.Generator().manual_seed(0)
    made = []
    for n in (6, 6, 6, 3):
        own, partners = torch.randint(NUM_CLASSES, (2, n), generator=generator)
        share = torch.rand((), generator=generator)
        made.append((torch.randn(n, 3, 8, 8, generator=generator), (own, partners, share)))
    states = [start(tiny, None), start()]
    losses = [
        train_epoch(s, made, objective=mixed, lr_at=lambda step: 0.1, precision="fp32")
        for s in states
    ]
    assert states[1].path == "graph"
    assert losses[0] == losses[1]
    assert same(*states)


def counting(made: list):
    def make_recorder():
        record = call_again()

        def counted(run):
            made.append(run)
            return record(run)

        return counted

    return make_recorder


def test_a_recording_is_made_for_each_size_and_again_for_another_objective():
    made = []
    state = start(make_recorder=counting(made))
    train(state, range(2))  # the objective of epoch 1 is another object of the same terms
    assert len(made) == 2
    train(state, range(2, 4))
    assert len(made) == 4


def test_what_a_recording_reads_stays_in_memory_while_it_is_replayed():
    """A graph knows addresses alone, and would go on to read the terms of an objective that is
    gone."""
    held, terms = [], []

    def make_recorder():
        def record(run):
            for _ in range(WARM_UP):
                run()
            held.append(run)
            return partial(run_again, len(held) - 1)

        def run_again(number):
            if held:  # until the test takes it away: a graph holds no Python object
                held[number]()

        return record

    def remembered(epoch, device):
        made = objective(epoch, device)
        terms.append(weakref.ref(made.keywords["weights"]))
        return made

    state = start(make_recorder=make_recorder)
    train(state, range(1), objective=remembered)
    held.clear()
    train(state, range(1, 2), objective=remembered)  # of another object with the same terms
    gc.collect()
    assert len(state.recorded._recordings) == 2
    assert terms[0]() is not None


@pytest.mark.parametrize("part", ["model", "optimizer"])
def test_what_is_loaded_between_two_steps_is_what_the_next_starts_from(part):
    made, state, plain = [], None, None
    state, plain, other = start(make_recorder=counting(made)), start(tiny, None), start(tiny, None)
    train(other, range(5, 6))
    for each in (state, plain):
        train(each, range(2))
        getattr(each, part).load_state_dict(copy.deepcopy(getattr(other, part).state_dict()))
        train(each, range(2))
    assert same(state, plain)
    assert len(made) == {"model": 2, "optimizer": 4}[part]  # new momenta lie elsewhere


def test_a_copy_of_the_state_takes_steps_of_its_own():
    state, plain = start(), start(tiny, None)
    train(state, range(2))
    train(plain, range(2))
    trial = copy.deepcopy(state)
    train(trial, range(2, 4))
    assert same(state, plain)
    train(plain, range(2, 4))
    assert same(trial, plain)


# --- resuming ---------------------------------------------------------------------------------


@pytest.mark.parametrize("then", [call_again, None])
def test_a_checkpoint_in_the_middle_of_an_epoch_goes_on_either_way(then):
    class StopError(Exception):
        pass

    def stop():
        if first.step == 6:
            raise StopError

    plain, first, second = start(tiny, None), start(), start(tiny, then)
    expected = train(plain, range(3))
    train(first, range(1))
    load, draws = images(), draw_epoch(NUM_IMAGES, 1, 1)
    rest = {"lr_at": lambda step: 0.2 / (1 + step), "precision": "fp32", "load": load}
    with pytest.raises(StopError):
        train_epoch(first, batches_of(draws, BATCH), objective=objective(1), on_step=stop, **rest)

    saved = copy.deepcopy(first.optimizer.state_dict())
    (group,) = saved["param_groups"]
    assert (group["fused"], type(group["lr"])) == (None, float)  # nothing of a device in it
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(saved)
    second.step, second.losses, second.sizes = first.step, first.losses, first.sizes
    left = list(batches_of(draws, BATCH))[2:]
    losses = [train_epoch(second, left, objective=objective(1), **rest)]
    losses += train(second, range(2, 3), load)
    assert losses == expected[1:]
    assert same(second, plain)


# --- losses that are not finite ---------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_at_its_step():
    load = images()
    poisoned = [0.0, 0.0, 0.0, float("nan"), 0.0, 0.0]
    spoilt_draws = [(*draw, torch.tensor([poisoned[i]])) for i, draw in enumerate(draws_of(6))]

    def spoilt(*draw_and_extra):
        *draw, extra = draw_and_extra
        values, targets = load(*draw)
        return values + extra, targets

    state = start()
    state.step = 10
    with pytest.raises(NonFiniteLossError, match=r"step 13 \(lr 0\.0013\)"):
        train_epoch(
            state,
            spoilt_draws,
            objective=objective(0),
            lr_at=lambda step: step / 10_000,
            precision="fp32",
            load=spoilt,
        )
    assert state.path == "graph"


def draws_of(num_batches: int) -> list:
    full = [d for epoch in range(2) for d in batches_of(draw_epoch(NUM_IMAGES, 1, epoch), BATCH)]
    return [d for d in full if len(d.order) == BATCH][:num_batches]


# --- the check --------------------------------------------------------------------------------


def test_recording_leaves_the_state_as_it_was():
    """Warm-up steps change weights, momenta and statistics; all are put back."""
    state = start()
    train(state, range(1))
    before, seen = copy.deepcopy(state), []

    class Watched(RecordedSteps):
        def _record(self, *arguments, **named):
            recording = super()._record(*arguments, **named)
            seen.append(same(state, before))
            return recording

    state.recorded = Watched(call_again)
    train_step_of(state, draws_of(1)[0])
    assert seen == [True]
    assert not same(state, before)


def train_step_of(state, draw, precision="fp32"):
    return train_epoch(
        state,
        [draw],
        objective=objective(0),
        lr_at=lambda step: 0.1,
        precision=precision,
        load=images(),
    )


def refusing():
    def record(run):
        run()
        raise RuntimeError("operation not permitted when stream is capturing\nand much more")

    return record


def no_driver():
    raise RuntimeError("no driver")


def doing(otherwise):
    """A recorder whose replays differ from the step."""

    def make_recorder():
        def record(run):
            for _ in range(WARM_UP):
                run()
            return partial(otherwise, run)

        return record

    return make_recorder


def nothing(run):
    pass


def twice(run):
    run()
    run()


def of_another_run(run):
    """Computes the loss as it should, but leaves weights and statistics alone."""
    state = started[-1]
    kept = [values.clone() for values in tensors_of(state)]
    run()
    with torch.no_grad():
        for values, value in zip(tensors_of(state), kept, strict=True):
            values.copy_(value)


def at_the_rate_of_the_recording(run):
    started[-1].recorded._lr.zero_()
    run()


def without_momentum(run):
    for values in started[-1].optimizer.state.values():
        values["momentum_buffer"].zero_()
    run()


def of_the_batch_of_the_recording(run):
    own = next(c.cell_contents for c in run.__closure__ if isinstance(c.cell_contents, tuple))
    fast_step._fill(own, fast_step._first_half_twice(own))
    run()


def with_statistics_that_stand_still(run):
    kept = started[-1].model[1].running_mean.clone()
    run()
    started[-1].model[1].running_mean.copy_(kept)


def at_four_fifths_of_the_rate(run):
    started[-1].recorded._lr.mul_(0.8)
    run()


def not_a_number(run):
    run()
    with torch.no_grad():
        next(started[-1].model.parameters()).fill_(float("nan"))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("make_recorder", "reason"),
    [
        (refusing, "operation not permitted when stream is capturing"),
        (no_driver, "no driver"),
        (doing(nothing), "has loss|of its change"),
        (doing(twice), "has loss|of its change"),
        (doing(of_another_run), "of its change"),
        (doing(at_the_rate_of_the_recording), "of its change"),
        (doing(without_momentum), "of its change"),
        (doing(of_the_batch_of_the_recording), "has loss|of its change"),
        (doing(with_statistics_that_stand_still), "of its change"),
        (doing(not_a_number), "nan of its change"),
    ],
)
def test_where_a_replay_does_something_else_steps_are_plain_and_one_warning_says_why(
    make_recorder, reason, precision
):
    plain, state = (start(tiny, make, precision=precision) for make in (None, make_recorder))
    expected = train(plain, range(2), precision=precision)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        losses = train(state, range(2), precision=precision)
    (warning,) = [w for w in caught if issubclass(w.category, UserWarning)]
    assert str(warning.message).startswith("training steps are not replayed, and slower: ")
    assert re.search(reason, str(warning.message))
    assert "\n" not in str(warning.message)
    assert state.path == "plain"
    assert losses == expected
    assert same(state, plain)


def test_in_fp32_a_replay_that_falls_a_little_short_is_refused():
    """In bf16 so much may be rounding."""
    state = start(tiny, doing(at_four_fifths_of_the_rate))
    with pytest.warns(UserWarning, match="of its change"):
        train(state, range(1))


def test_what_rounding_takes_too_far_with_one_batch_is_looked_at_with_another():
    too_far = [True]

    def at_first_a_little_short(run):
        rate = started[-1].recorded._lr
        before = rate.clone()
        rate.mul_(0.8 if too_far.pop() else 1)
        too_far.append(False)
        run()
        rate.copy_(before)

    plain, state = start(tiny, None), start(tiny, doing(at_first_a_little_short))
    assert train(state, range(2)) == train(plain, range(2))
    assert state.path == "graph"
    assert same(state, plain)


def test_the_second_look_is_at_other_images_than_the_recordings():
    rows, scalar = torch.arange(8), torch.tensor(3)
    ((found, _), same_scalar) = fast_step._without_the_first_quarter(((rows, rows), scalar))
    assert found.tolist() == [2, 3, 4, 5, 6, 7, 2, 3]
    assert same_scalar is scalar
    assert fast_step._first_half_twice((rows,))[0].tolist() == [0, 1, 2, 3, 0, 1, 2, 3]


@pytest.mark.parametrize(
    ("plain", "replayed", "is_same"), [(6.0, 6.05, True), (6.0, 6.07, False), (2e-4, 4e-4, True)]
)
def test_a_loss_may_differ_by_what_rounding_does_to_logits(plain, replayed, is_same):
    """Which stays, however small a loss becomes late in a training."""
    state = start()

    def step(state, batch, lr):
        with torch.no_grad():
            for values in tensors_of(state):
                values.add_(1)
        return torch.tensor(plain)

    replay, loss = (lambda: step(state, (), 0.0)), torch.tensor(replayed)
    recording = SimpleNamespace(batch=(), replay=replay, loss=loss)
    with nullcontext() if is_same else pytest.raises(CannotRecordError, match="has loss"):
        fast_step.require_same_step(state, (), step, recording, "bf16")


def test_kernels_that_fail_are_told_once_for_batches_of_all_sizes(monkeypatch):
    @contextmanager
    def failing(model):
        raise RuntimeError("out of shared memory")
        yield

    monkeypatch.setattr(fast_step, "fusible", lambda model: {model: None})
    monkeypatch.setattr(fast_step, "require_same_layers", lambda model, run: run())
    monkeypatch.setattr(fast_step, "fused", failing)
    with pytest.warns(UserWarning, match="not fused") as caught:
        train(start(fuses=True), range(2))
    assert len(caught) == 1


def test_where_kernels_fail_with_one_size_steps_of_all_sizes_are_without_them(monkeypatch):
    made, layers = [], []

    def second_one_wrong(model, run):
        layers.append(run())
        if len(layers) == 2:
            raise CannotRecordError("a layer is not PyTorch's")

    monkeypatch.setattr(fast_step, "fusible", lambda model: {model: None})
    monkeypatch.setattr(fast_step, "require_same_layers", second_one_wrong)
    monkeypatch.setattr(fast_step, "fused", lambda model: nullcontext())
    state = start(make_recorder=counting(made), fuses=True)
    with pytest.warns(UserWarning, match="kernels are not fused, and slower: a layer"):
        train(state, range(2))
    assert len(made) == 3  # of whole batches with kernels; of the short one and of these without
    assert state.path == "graph"


def test_after_a_refusal_the_state_is_as_it_was():
    state = start(make_recorder=refusing)
    make_momenta(state.optimizer)
    before, tensors = copy.deepcopy(state), tensors_of(state)

    def step(state, batch, lr):
        return train_step(state, *images()(*batch), objective(0), lr, "fp32")

    with pytest.raises(CannotRecordError):
        state.recorded.take(state, draws_of(1)[0], 0.1, step, kind=(), precision="fp32")
    assert same(state, before)
    assert all(x is y for x, y in zip(tensors_of(state), tensors, strict=True))
    (group,) = state.optimizer.param_groups
    assert (group["lr"], group["fused"]) == (0.1, None)
    assert all(p.grad is None for p in state.model.parameters())


def test_where_a_later_replay_is_refused_the_rest_are_plain():
    """As PyTorch 2.11 does while another thread's capture is under way, or has failed."""
    left = [None] * 7

    def make_recorder():
        def record(run):
            replay = call_again()(run)
            return lambda: (left.pop() if left else refuse(), replay())

        return record

    def refuse():
        raise RuntimeError("Offset increment outside graph capture")

    state, plain = start(make_recorder=make_recorder), start(make_recorder=None)
    with pytest.warns(UserWarning, match="not replayed, and slower: Offset increment") as caught:
        losses = train(state, range(3))
    assert len(caught) == 1
    assert state.path == "plain"
    assert losses == train(plain, range(3))
    assert same(state, plain)


@pytest.mark.parametrize("make_recorder", [None, call_again])
def test_nothing_remains_of_steps_that_are_to_leave_the_state_as_it_was(make_recorder):
    state, untouched = start(make_recorder=make_recorder), start(make_recorder=None)
    with left_as_it_was(state):
        train(state, range(1))
        assert state.step == 4
    losses = [train(state, range(3)), train(untouched, range(3))]
    assert losses[0] == losses[1]
    assert same(state, untouched)


def test_what_is_kept_to_be_put_back_holds_no_nodes_that_gather_gradients():
    """On a GPU such a node knows the stream that it was made on, and a capture on another fails."""
    state = start(make_recorder=None)
    parameter = next(state.model.parameters())

    def node():
        return parameter.expand_as(parameter).grad_fn.next_functions[0][0]

    with left_as_it_was(state):
        node().metadata["seen"] = True  # stays for as long as the node does
        assert "seen" not in node().metadata


def test_fused_kernels_that_fail_leave_no_such_nodes_to_the_recording_without_them(monkeypatch):
    class Failing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            raise RuntimeError("out of shared memory")

    state = start(make_recorder=lambda: record_and_look, fuses=True)
    parameter = next(state.model.parameters())

    def node():
        return parameter.expand_as(parameter).grad_fn.next_functions[0][0]

    def fail(module, inputs, output):
        node().metadata["seen"] = True
        output = Failing.apply(output)
        circle = [output.grad_fn]  # as an exception and what it came through may be
        circle.append(circle)
        return output

    @contextmanager
    def failing(model):
        with model.register_forward_hook(fail):
            yield

    def record_and_look(run):
        assert "seen" not in node().metadata
        return call_again()(run)

    monkeypatch.setattr(fast_step, "fusible", lambda model: {model: None})
    monkeypatch.setattr(fast_step, "fused", failing)
    monkeypatch.setattr(fast_step, "require_same_layers", lambda model, run: run())
    with pytest.warns(UserWarning, match="kernels are not fused, and slower: out of shared"):
        train(state, range(1))
    assert state.path == "graph"


def test_how_far_apart_by_hand():
    before = [torch.zeros(2), torch.tensor([5.0])]
    plain = [torch.tensor([3.0, 4.0]), torch.tensor([5.0])]  # a change of length 5, and none
    assert how_far_apart(plain, plain, before) == 0
    for share in (0, 0.5, 1.5, 2):  # of the change: what is missing, or too much, counts
        ours = [share * plain[0], plain[1]]
        assert how_far_apart(ours, plain, before) == pytest.approx(abs(share - 1), rel=1e-4)
    ours = [torch.tensor([3.0 - 0.8, 4.0 + 0.6]), plain[1]]  # across the change: half of it
    assert how_far_apart(ours, plain, before) == pytest.approx(1 / 5 / 2, rel=1e-4)
    ours = [torch.tensor([3.0, 3.0]), plain[1]]  # -1 of 4 along (3, 4) / 5: 0.8 of 5
    assert how_far_apart(ours, plain, before) == pytest.approx(0.8 / 5, rel=1e-4)
    assert how_far_apart([plain[0], torch.tensor([6.0])], plain, before) > 1e4
    assert how_far_apart([plain[0], torch.tensor([5.0000005])], plain, before) < 0.1
    broken = how_far_apart([plain[0], torch.tensor([float("nan")])], plain, before)
    assert broken != broken


# --- forward passes ---------------------------------------------------------------------------

RECORD_AFTER = 6


@pytest.fixture(autouse=True)
def _recorded_early(monkeypatch):
    monkeypatch.setattr(fast_step, "RECORD_AFTER", RECORD_AFTER)


def predict(model, passes=None, num_images=44) -> torch.Tensor:
    """Logits of batches of 4 and what is left; other images for another number of them."""
    generator = torch.Generator().manual_seed(num_images)
    images = torch.randn(num_images, 3, 8, 8, generator=generator)
    return predict_logits(model, images.split(4), passes=passes)


def noting(recorded: list, replayed: list):
    """A recorder of passes that notes each recording and each replay."""

    def record(run):
        recorded.append(run)
        for _ in range(WARM_UP):
            run()
        return lambda: (replayed.append(run), run())

    return lambda: record


def test_replayed_passes_return_what_the_model_does():
    model, recorded, replayed = tiny(), [], []
    passes = RecordedPasses(noting(recorded, replayed))
    for num_images in (40, 42, 43, 40):
        assert torch.equal(predict(model, passes, num_images), predict(model, None, num_images))
    assert len(recorded) == 1  # 2 and 3 images came once each
    assert len(replayed) == 1 + 40 - RECORD_AFTER  # with the check


def test_replayed_logits_that_are_no_numbers_are_no_replay():
    def record(run):
        tensors = [c.cell_contents for c in run.__closure__ if torch.is_tensor(c.cell_contents)]
        (logits,) = [tensor for tensor in tensors if tensor.dim() == 2]
        return lambda: logits.fill_(float("nan"))

    model = tiny()
    with pytest.warns(UserWarning, match="replayed logits are nan"):
        found = predict(model, RecordedPasses(lambda: record))
    assert torch.equal(found, predict(model))


def test_a_size_is_recorded_only_where_it_comes_often():
    model, made = tiny(), []
    passes = RecordedPasses(counting(made))
    predict(model, passes, 4 * RECORD_AFTER)
    assert made == []
    predict(model, passes, 4)
    assert len(made) == 1


def test_replays_read_the_weights_as_they_are():
    model, passes = tiny(), RecordedPasses(call_again)
    before = predict(model, passes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    model[1].running_mean.add_(0.1)
    after = predict(model, passes)
    assert not torch.allclose(before, after)
    assert torch.equal(after, predict(model))


def test_another_model_is_recorded_anew_and_a_copy_has_recordings_of_its_own():
    model, made = tiny(), []
    passes = RecordedPasses(counting(made))
    predict(model, passes)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[5].bias.add_(1)
    for recordings in (passes, copy.deepcopy(passes)):
        assert torch.equal(predict(other, recordings), predict(other))
    assert len(made) == 3


def test_what_a_pass_returned_stays_while_others_are_replayed():
    model, passes = tiny(), RecordedPasses(call_again)
    predict(model, passes)
    with torch.inference_mode():
        first = passes.take(model, torch.ones(4, 3, 8, 8))
        kept = first.clone()
        passes.take(model, torch.zeros(4, 3, 8, 8))
    assert torch.equal(first, kept)


def test_where_a_later_replay_is_refused_passes_are_plain():
    model, run_out = tiny(), [None] * 3
    passes = RecordedPasses(lambda: lambda run: lambda: (run_out.pop(), run()))
    with pytest.warns(UserWarning, match="not replayed, and slower: pop from empty list") as caught:
        found = predict(model, passes)
    assert len(caught) == 1
    assert torch.equal(found, predict(model))


@pytest.mark.parametrize(
    ("make_recorder", "reason"),
    [
        (refusing, "operation not permitted when stream is capturing$"),
        (no_driver, "no driver"),
        (doing(nothing), "replayed logits are .* of their length away from plain ones"),
    ],
)
def test_where_passes_cannot_be_replayed_one_warning_says_why(make_recorder, reason):
    model = tiny()
    passes = RecordedPasses(make_recorder)
    with pytest.warns(UserWarning, match=f"not replayed, and slower: .*{reason}") as caught:
        found = [predict(model, passes, num_images) for num_images in (44, 42)]
    assert len(caught) == 1
    for logits, num_images in zip(found, (44, 42), strict=True):
        assert torch.equal(logits, predict(model, None, num_images))


# --- what a graph can hold --------------------------------------------------------------------


class Operators(TorchDispatchMode):
    """Names of the operators that run, and those that touch a CPU."""

    def __init__(self):
        super().__init__()
        self.names, self.elsewhere = [], []

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        name = str(function)
        self.names.append(name)
        # FakeTensorMode has no kernel of the update.
        out = None if "fused_sgd" in name else function(*arguments, **(named or {}))
        leaves = torch.utils._pytree.tree_leaves((arguments, named, out))
        if any(x.device.type != "cuda" for x in leaves if torch.is_tensor(x)):
            self.elsewhere.append(name)
        return out


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="PyTorch is built without CUDA")
@pytest.mark.filterwarnings("ignore:.*Disabling autocast")
@pytest.mark.parametrize("shortcut", ["projection", "pad"])
@pytest.mark.parametrize("loss", LOSSES)
def test_nothing_of_a_step_is_read_back_or_sent_to_the_device(loss, shortcut, monkeypatch):
    """What a CUDA graph cannot hold. Shapes alone run, on a device that need not be there; the
    backward pass is left out, which PyTorch does not run without the device."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    terms = LOSSES[loss].terms(COUNTS, Knobs())
    shapes = {key: values.shape for key, values in terms.items()}
    made_once = functools.cache(batches._mean_and_std.__wrapped__)
    monkeypatch.setattr(batches, "_mean_and_std", made_once)

    def with_gradients(*_):
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)

    with FakeTensorMode():
        with torch.device("cuda"):
            model = ResNet32(NUM_CLASSES, shortcut, LOSSES[loss].head)
            padded = torch.zeros(20, 40, 40, 3, dtype=torch.uint8)
            targets, lr = torch.zeros(20, dtype=torch.int64), torch.zeros(())
            draw = [torch.zeros(8, dtype=torch.int64) for _ in range(3)]
            draw.append(torch.zeros(8, dtype=torch.bool))
            draw += [torch.zeros(8, 0), torch.zeros(8, 0, 4), torch.zeros(8, 0)]  # nothing strong
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
        make_momenta(optimizer)
        terms = {key: torch.zeros(shape, device="cuda") for key, shape in shapes.items()}
        criterion = partial(LOSSES[loss].function, **terms)
        state = TrainState(model.train(), optimizer)
        monkeypatch.setattr(torch.Tensor, "backward", with_gradients)
        load_batch(padded, targets, *draw)  # what is made once a device
        with Operators() as operators, fast_step._rate_in_memory(optimizer):
            train_step(state, *load_batch(padded, targets, *draw), criterion, lr, "fp32")
    assert operators.elsewhere == []
    assert "aten._fused_sgd_.tensor_lr" in operators.names
    forbidden = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero")
    assert not [name for name in operators.names if any(word in name for word in forbidden)]
    assert len([name for name in operators.names if "convolution" in name]) >= 31


# --- on a GPU ---------------------------------------------------------------------------------


@pytest.mark.gpu
def test_on_a_gpu_replayed_steps_equal_plain_ones():
    """fp32, 52 steps: losses within 1e-4, weights within 1e-3 of their largest value."""
    load = images("cuda")
    plain, graph = start(tiny, None, "cuda"), start_on_gpu(tiny)
    expected = train(plain, load=load)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        losses = train(graph, load=load)
    assert (plain.path, graph.path) == ("plain", "graph")
    assert losses == pytest.approx(expected, rel=1e-4)
    for ours, theirs in zip(tensors_of(graph), tensors_of(plain), strict=True):
        scale = max(float(theirs.detach().abs().max()), 1e-3)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3 * scale)


@pytest.mark.gpu
def test_on_a_gpu_experts_at_once_equal_each_alone():
    """fp32, 52 steps: losses within 1e-4, weights within 1e-3 of their largest value."""
    load = images("cuda")

    def expert(lr: float) -> tuple[list[float], list[torch.Tensor]]:
        state = start_on_gpu(tiny)
        losses = train(state, range(1), load, lr=lr)  # recorded in turn
        with beside_the_others():
            losses += train(state, range(1, 13), load, lr=lr)
        assert state.path == "graph"
        return losses, [values.cpu() for values in tensors_of(state)]

    rates = {"a": 0.2, "b": 0.1, "c": 0.05}
    alone = {name: expert(lr) for name, lr in rates.items()}
    together = at_once({name: partial(expert, lr) for name, lr in rates.items()}, "cuda")
    for name, (losses, tensors) in together.items():
        assert losses == pytest.approx(alone[name][0], rel=1e-4)
        for ours, theirs in zip(tensors, alone[name][1], strict=True):
            scale = max(float(theirs.abs().max()), 1e-3)
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3 * scale)


@pytest.mark.gpu
def test_on_a_gpu_resnets_at_once_equal_each_alone():
    """bf16, with fused kernels: losses of the first 8 steps within 5 %."""
    load = images("cuda")

    def expert(lr: float) -> list[float]:
        state = start_on_gpu(resnet, "bf16", fuses=True)
        losses = train(state, range(1), load, lr=lr, precision="bf16")
        with beside_the_others():
            losses += train(state, range(1, 2), load, lr=lr, precision="bf16")
        assert state.path == "fused"
        return losses

    rates = {"a": 0.02, "b": 0.01, "c": 0.005}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        together = at_once({name: partial(expert, lr) for name, lr in rates.items()}, "cuda")
    for name, lr in rates.items():
        assert together[name] == pytest.approx(expert(lr), rel=5e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("path", ["graph", "fused"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_on_a_gpu_a_resnet_is_replayed(precision, path):
    """The first steps; later on, rounding decides which of the activations next to 0 pass."""
    load = images("cuda")
    plain = start(resnet, None, "cuda")
    graph = start_on_gpu(resnet, precision, fuses=path == "fused")
    expected = train(plain, range(2), load, lr=0.01, precision=precision)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        losses = train(graph, range(2), load, lr=0.01, precision=precision)
    assert graph.path == path
    assert losses == pytest.approx(expected, rel={"fp32": 1e-2, "bf16": 5e-2}[precision])


@pytest.mark.gpu
def test_on_a_gpu_where_fused_kernels_fail_pytorchs_are_recorded(monkeypatch):
    """Of one model after another: what one that failed leaves must not hinder the next."""
    from longtail_experts.learning import fused_conv  # imports Triton

    def fail(*arguments):
        raise RuntimeError("out of shared memory")

    monkeypatch.setattr(fused_conv, "_weight_gradient", fail)
    for _ in range(2):
        state = start_on_gpu(resnet, "bf16", fuses=True)
        with pytest.warns(UserWarning, match="kernels are not fused") as caught:
            train(state, range(1), images("cuda"), lr=0.01, precision="bf16")
        assert state.path == "graph", [str(warning.message) for warning in caught]


@pytest.mark.gpu
def test_on_a_gpu_replayed_passes_equal_plain_ones():
    """1e-5 of the largest logit, of weights that change between passes as well."""
    model, passes = resnet().cuda(), RecordedPasses()
    pixels = torch.randint(256, (44, 32, 32, 3), dtype=torch.uint8, device="cuda")
    images = batches.normalise(pixels).split(4)
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = predict_logits(model, images, passes=passes)
        expected = predict_logits(model, images)
        assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)


@pytest.mark.gpu
def test_on_a_gpu_what_cannot_be_captured_is_plain_with_one_warning():
    """In a process of its own: after a capture that failed, older PyTorch refuses all others."""
    code = "import test_fast_step; test_fast_step.cannot_be_captured()"
    subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},  # also where pytest found src
        cwd=Path(__file__).parent,
        check=True,
        timeout=300,
    )


def cannot_be_captured() -> None:
    load = images("cuda")

    def reads_back(*draw):
        assert int(draw[0][0]) >= 0
        return load(*draw)

    state = start_on_gpu(tiny)
    draws = batches_of(draw_epoch(NUM_IMAGES, 1, 0, "cuda"), BATCH)
    with pytest.warns(UserWarning, match="not replayed, and slower") as caught:
        train_epoch(
            state,
            draws,
            objective=objective(0, "cuda"),
            lr_at=lambda step: 0.1,
            precision="fp32",
            load=reads_back,
        )
    assert len(caught) == 1
    assert state.path == "plain"
    assert state.step == 4


@pytest.mark.gpu
def test_on_a_gpu_fast_false_is_plain():
    settings = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.0, "device": "cuda"}
    paths = [
        start_training(tiny(), **settings, precision="fp32", fast=fast).path
        for fast in (True, False)
    ]
    assert paths == ["graph", "plain"]


def start_on_gpu(build, precision="fp32", fuses=False) -> TrainState:
    return start(build, fast_step.cuda_graphs, "cuda", fuses, precision=precision)
