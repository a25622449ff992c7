"""What can be said about a recipe before it runs: one small rule a knob, in plain values.

Verdicts: "ok"; "note", worth knowing and often intended; "warning", most likely a mistake;
"blocking", the run would fail, or spend hours on something else than was asked for.
docs/preflight.md lists the rules with their sources.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from longtail_experts.learning.losses import KNOBS_OF
from longtail_experts.learning.schedule import reweighted_from

REFERENCE_LR, REFERENCE_BATCH = 0.1, 128  # He et al. (CVPR 2016), section 4.2
RECIPE_LR = 0.4  # at the same batch: Narasimhan et al. (ICLR 2024), appendix F, with a warm-up
RECIPE_WEIGHT_DECAY, RECIPE_MOMENTUM = 1e-4, 0.9
LDAM_WEIGHT_DECAY = 2e-4  # Cao et al. (NeurIPS 2019)
FEW_IMAGES = 10  # of a class in the train split
FEW_VALIDATIONS = 5
LONG_TRAINING = 100_000  # images over all epochs; below it, a quick look
MOST_IDENTICAL = 0.01  # of all images, with pixels that another split has too
NEARLY_FULL = 0.8


class Finding(NamedTuple):
    """A verdict on one knob, or on one fact of the data or the machine."""

    field: str
    value: str
    verdict: str
    message: str = ""


def blocking(findings: Iterable[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.verdict == "blocking"]


# --- the loss ---------------------------------------------------------------------------------


def loss_rule(loss: str, tau: float) -> Finding:
    if loss == "all" and tau == 1:
        return Finding(
            "loss",
            loss,
            "note",
            "at tau 1, logit_adjust and balanced_softmax are the same function up to a constant: "
            "these two experts differ by seed alone",
        )
    return Finding("loss", loss, "ok")


def tau_rule(tau: float, loss: str) -> Finding:
    value = f"{tau:g}"
    if loss not in ("logit_adjust", "all"):
        used = "" if tau == 1 else f"not used by {loss}"
        return Finding("tau", value, "note" if used else "ok", used)
    if tau == 0:
        return Finding("tau", value, "warning", "logit_adjust at tau 0 is cross-entropy; give 1")
    if tau != 1:
        return Finding(
            "tau", value, "note", "Menon et al. (ICLR 2021): 1 is consistent for balanced error"
        )
    return Finding("tau", value, "ok")


def knob_rule(name: str, value: float, default: float, loss: str) -> Finding:
    is_used = name in KNOBS_OF.get(loss, ())
    used = "" if value == default or is_used else f"not used by {loss}"
    return Finding(name, f"{value:g}", "note" if used else "ok", used)


def protocol_rule(protocol: str, subset_rule: str) -> Finding:
    if protocol == "literature":
        subset = "" if subset_rule == "ldam" else "; on a subset of its own, not LDAM's"
        return Finding(
            "protocol",
            protocol,
            "note",
            "no hold-out: the last epoch stands, and the temperature is cross-fitted on the test "
            f"images{subset}",
        )
    return Finding("protocol", protocol, "ok")


def reweight_rule(
    reweight_from: int | None, loss: str, epochs: int, milestones: Sequence[int]
) -> Finding:
    value = "none" if reweight_from is None else str(reweight_from)
    if loss != "ldam_drw":
        used = "" if reweight_from is None else f"not used by {loss}"
        return Finding("reweight_from", value, "note" if used else "ok", used)
    start = reweighted_from(reweight_from, milestones)
    if start >= epochs:
        says = f"the weights never act: epoch {start} of {epochs}; give 0.8 x epochs as LDAM has it"
        return Finding("reweight_from", value, "warning", says)
    if reweight_from is None and not milestones:
        says = "nothing is deferred: the weights act from epoch 0; give 0.8 x epochs as LDAM has it"
        return Finding("reweight_from", value, "warning", says)
    return Finding("reweight_from", value, "ok", f"weights act from epoch {start}")


# --- the optimiser ----------------------------------------------------------------------------


def lr_rule(lr: float, batch_size: int, warmup_steps: int, steps_per_epoch: int) -> Finding:
    """Linear scaling, Goyal et al. (2017): the rate grows with the batch, from 0.1 at 128.

    Within a factor of 2 all is well, up to 4 worth a note, beyond that a warning. More than 2
    times the reference without a warm-up is a warning in any case.
    """
    reference = REFERENCE_LR * batch_size / REFERENCE_BATCH
    ratio, slack = lr / reference, 1 + 1e-9
    factor = max(ratio, 1 / ratio)
    value = f"{lr:g}"
    says = f"{ratio:.3g} x the linear-scaling reference {reference:.3g} (0.1 at batch 128)"
    if factor <= 2 * slack:
        return Finding("lr", value, "ok", says)
    if ratio > 1 and warmup_steps <= 1:
        remedy = f"give warmup_steps={steps_per_epoch}, one epoch, or lr={reference:.3g}"
        return Finding("lr", value, "warning", f"{says}, and no warm-up: {remedy}")
    if factor > 4 * slack:
        return Finding("lr", value, "warning", f"{says}: give a rate nearer to that")
    if math.isclose(ratio, RECIPE_LR / REFERENCE_LR):
        says += "; the rate of Narasimhan et al. (ICLR 2024, appendix F), who warm up as well"
    return Finding("lr", value, "note", says)


def warmup_rule(
    warmup_steps: int,
    steps_per_epoch: int,
    epochs: int,
    milestones: Sequence[int],
    num_images: int,
    warmup_epochs: int = 0,
) -> Finding:
    """One epoch is recommended. Blocking where a long training would never reach its rate."""
    if warmup_epochs:
        return Finding(
            "warmup_steps", str(warmup_steps), "ok", f"warmup_epochs={warmup_epochs} instead"
        )
    value, one_epoch = str(warmup_steps), f"warmup_steps={steps_per_epoch} is one epoch"
    first_end = min([epochs, *milestones])  # epoch at which the full rate is over
    if warmup_steps > first_end * steps_per_epoch:
        what = "the first milestone" if first_end < epochs else "the end of the training"
        return Finding(
            "warmup_steps",
            value,
            "blocking" if epochs * num_images >= LONG_TRAINING else "warning",
            f"the rate never reaches lr: {what} comes at step {first_end * steps_per_epoch:,}; "
            f"{one_epoch}",
        )
    if warmup_steps < steps_per_epoch:
        return Finding("warmup_steps", value, "note", f"less than one epoch; {one_epoch}")
    says = f"{warmup_steps / steps_per_epoch:.3g} x one epoch"
    return Finding("warmup_steps", value, "ok", says)


def warmup_epochs_rule(
    warmup_epochs: int, epochs: int, milestones: Sequence[int], num_images: int
) -> Finding:
    """Blocking where a long training would never reach its rate."""
    first_end = min([epochs, *milestones])
    if warmup_epochs > first_end:
        return Finding(
            "warmup_epochs",
            str(warmup_epochs),
            "blocking" if epochs * num_images >= LONG_TRAINING else "warning",
            f"the rate never reaches lr: it falls, or training ends, at epoch {first_end}; give "
            f"{min(5, first_end)}",
        )
    return Finding("warmup_epochs", str(warmup_epochs), "ok")


def milestones_rule(
    milestones: Sequence[int],
    epochs: int,
    lr_schedule: str = "milestones",
    reweights: bool = False,
) -> Finding:
    """reweights: whether the loss takes the first one as the epoch from which it weighs classes."""
    value = ",".join(map(str, milestones)) or "none"
    if lr_schedule == "cosine":
        used = "not used by lr_schedule=cosine" if milestones else ""
        if used and reweights:
            start = reweighted_from(None, milestones)
            used += f", but ldam_drw weighs classes from epoch {start}"
        return Finding("milestones", value, "note" if used else "ok", used)
    late = [m for m in milestones if m >= epochs]
    if late:
        says = f"{','.join(map(str, late))} lie at or past epochs={epochs} and will not act"
        return Finding("milestones", value, "warning", says)
    if not milestones:
        return Finding("milestones", value, "note", "the rate never falls")
    return Finding("milestones", value, "ok")


def weight_decay_rule(weight_decay: float) -> Finding:
    value = f"{weight_decay:g}"
    if math.isclose(weight_decay, LDAM_WEIGHT_DECAY):
        return Finding(
            "weight_decay", value, "note", "LDAM's value (2e-4), twice this recipe's 1e-4"
        )
    ratio = weight_decay / RECIPE_WEIGHT_DECAY
    if not 0.1 <= ratio <= 10:
        return Finding(
            "weight_decay", value, "warning", "more than ten times away from this recipe's 1e-4"
        )
    if not math.isclose(ratio, 1):
        return Finding("weight_decay", value, "note", f"{ratio:.3g} x this recipe's 1e-4")
    return Finding("weight_decay", value, "ok")


def momentum_rule(momentum: float) -> Finding:
    """What moves the weights in the long run is lr / (1 - momentum)."""
    value, ratio = f"{momentum:g}", (1 - RECIPE_MOMENTUM) / (1 - momentum)
    if math.isclose(ratio, 1):
        return Finding("momentum", value, "ok")
    says = f"moves the weights {ratio:.3g} x as far as 0.9 does, for which lr is judged"
    return Finding("momentum", value, "note" if 1 / 4.0001 < ratio < 4.0001 else "warning", says)


def lr_decay_rule(lr_decay: float, milestones: Sequence[int], lr_schedule: str) -> Finding:
    value = f"{lr_decay:g}"
    if lr_decay >= 1 and milestones and lr_schedule == "milestones":
        says = "the rate does not fall at the milestones: give less than 1, as 0.1"
        return Finding("lr_decay", value, "warning", says)
    return Finding("lr_decay", value, "ok")


def batch_rule(batch_size: int, num_images: int) -> Finding:
    steps = math.ceil(num_images / batch_size)
    if steps == 1 and batch_size > 1:
        return Finding(
            "batch_size",
            str(batch_size),
            "warning",
            f"the whole train split of {num_images:,} images is one step an epoch; give less",
        )
    return Finding("batch_size", str(batch_size), "ok", f"{steps:,} steps an epoch")


def precision_rule(device: str, precision: str, has_bf16: bool) -> Finding:
    if (device, precision) == ("cpu", "bf16") and not has_bf16:
        says = "this processor has no bf16 instructions: slower than fp32"
        return Finding("precision", precision, "warning", says)
    return Finding("precision", precision, "ok")


# --- when it looks and saves ------------------------------------------------------------------


def num_validations(validation_every: int, epochs: int) -> int:
    """After every so many epochs, and after the last."""
    return math.ceil(epochs / validation_every)


def validation_rule(validation_every: int, epochs: int) -> Finding:
    value, count = str(validation_every), num_validations(validation_every, epochs)
    if count == 1:
        return Finding(
            "validation_every",
            value,
            "warning" if epochs > 1 else "note",
            "the only validation is that after the last epoch: no checkpoint is selected"
            + (f"; give {max(1, epochs // 10)}" if epochs > 1 else ""),
        )
    verdict = "note" if count < FEW_VALIDATIONS else "ok"
    return Finding("validation_every", value, verdict, f"{count} validations")


def patience_rule(
    patience: int | None, validation_every: int, epochs: int, starts_at: int
) -> Finding:
    """Patience is counted in validations, from epoch `starts_at` on."""
    if patience is None:
        return Finding("early_stopping_patience", "none", "ok")
    left = num_validations(validation_every, epochs) - starts_at // validation_every
    left -= starts_at < validation_every  # the first of all is better than none
    if patience >= left:
        says = (
            f"can never act: {max(left, 0)} validations follow the first one and epoch {starts_at}"
        )
        return Finding("early_stopping_patience", str(patience), "note", says)
    return Finding("early_stopping_patience", str(patience), "ok")


def checkpoint_rule(checkpoint_every: int, epochs: int) -> Finding:
    if checkpoint_every >= epochs > 1:
        return Finding(
            "checkpoint_every",
            str(checkpoint_every),
            "note",
            "no checkpoint before the end: a crash costs the whole training",
        )
    return Finding("checkpoint_every", str(checkpoint_every), "ok")


# --- the data ---------------------------------------------------------------------------------


def source_rule(source: str) -> Finding:
    if source == "synthetic":
        return Finding("source", source, "note", "generated images: a demonstration")
    return Finding("source", source, "ok")


def images_per_class_rule(images_per_class: int | None, source: str) -> Finding:
    value = "none" if images_per_class is None else str(images_per_class)
    largest = {"cifar100": 500, "cifar10": 5000}.get(source)
    if images_per_class is not None and largest and images_per_class != largest:
        says = f"not the benchmark, whose largest class has {largest:,}"
        return Finding("images_per_class", value, "note", says)
    return Finding("images_per_class", value, "ok")


def few_images_rule(train_counts: Sequence[int]) -> Finding:
    few = [n for n in train_counts if n < FEW_IMAGES]
    value = f"{sum(train_counts):,} images"
    if few:
        says = f"{len(few)} of {len(train_counts)} classes have under {FEW_IMAGES} images"
        return Finding("train split", value, "note", f"{says} (fewest: {min(few)})")
    return Finding("train split", value, "ok")


def absent_classes_rule(num_absent: Mapping[str, int], num_classes: int) -> Finding:
    """num_absent: classes absent by split. Never blocking: the pool's tail does not go round."""
    missing = [f"{split} {n}" for split, n in num_absent.items() if n]
    value = f"{num_classes} classes"
    if missing:
        says = f"classes absent: {', '.join(missing)}; by design where the tail does not go round"
        return Finding("splits", value, "note", says)
    return Finding("splits", value, "ok")


def identical_images_rule(num_in_several_splits: int, num_images: int) -> Finding:
    """CIFAR-100 has a handful of images whose pixels another split has too; more say that images
    are there twice, and that splits are not disjoint."""
    value = f"{num_in_several_splits} in several splits"
    if num_in_several_splits > MOST_IDENTICAL * num_images:
        says = "what is fitted on is reported on: the same images are in more than one split"
        return Finding("identical images", value, "warning", says)
    return Finding("identical images", value, "ok")


# --- the machine ------------------------------------------------------------------------------


def room_rule(what: str, needed: int, free: int, remedy: str) -> Finding:
    """Bytes needed against bytes free."""
    value = f"{megabytes(needed)} of {megabytes(free)} free"
    if needed > free:
        return Finding(what, value, "blocking", f"not enough: {remedy}")
    if needed > NEARLY_FULL * free:
        return Finding(what, value, "warning", f"just enough: {remedy}")
    return Finding(what, value, "ok")


def megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.0f} MB"
