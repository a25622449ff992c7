"""Each rule of the readiness report fires where it should, and nowhere else."""

import pytest

from longtail_experts.learning import rules
from longtail_experts.stages.train import Selection

FULL = {"steps_per_epoch": 68, "epochs": 256, "milestones": (96, 192, 224), "num_images": 8677}


@pytest.mark.parametrize(
    ("lr", "batch_size", "warmup_steps", "verdict", "says"),
    [
        (0.1, 128, 0, "ok", "1 x the linear-scaling reference 0.1"),
        (0.2, 256, 0, "ok", "1 x"),
        (0.2, 128, 0, "ok", "2 x"),
        (0.05, 128, 68, "ok", "0.5 x"),
        (0.4, 128, 68, "note", "Narasimhan"),
        (0.8, 256, 34, "note", "Narasimhan"),
        (0.3, 128, 68, "note", "3 x"),
        (0.4, 128, 0, "warning", "give warmup_steps=68, one epoch, or lr=0.1"),
        (0.4, 128, 1, "warning", "no warm-up"),
        (0.5, 128, 68, "warning", "5 x"),
        (0.4, 64, 68, "warning", "8 x the linear-scaling reference 0.05"),
        (0.03, 128, 68, "note", "0.3 x"),
        (0.02, 128, 68, "warning", "0.2 x"),
    ],
)
def test_lr_against_the_batch(lr, batch_size, warmup_steps, verdict, says):
    finding = rules.lr_rule(lr, batch_size, warmup_steps, 68)
    assert (finding.field, finding.verdict) == ("lr", verdict)
    assert says in finding.message
    assert ("Narasimhan" in finding.message) == ("Narasimhan" in says)


@pytest.mark.parametrize(
    ("warmup_steps", "changes", "verdict", "says"),
    [
        (68, {}, "ok", "1 x one epoch"),
        (15, {}, "note", "warmup_steps=68 is one epoch"),
        (0, {}, "note", "less than one epoch"),
        (68, {"epochs": 1}, "ok", ""),
        (96 * 68, {}, "ok", "96 x one epoch"),
        (96 * 68 + 1, {}, "blocking", "the first milestone comes at step 6,528"),
        (
            69,
            {"epochs": 1, "milestones": ()},
            "warning",
            "the end of the training comes at step 68",
        ),
        (300 * 68, {"milestones": ()}, "blocking", "17,408"),
        (300 * 68, {"milestones": (400,)}, "blocking", "17,408"),
    ],
)
def test_warm_up(warmup_steps, changes, verdict, says):
    finding = rules.warmup_rule(warmup_steps, **(FULL | changes))
    assert finding.verdict == verdict
    assert says in finding.message


def test_a_warm_up_is_complete_exactly_where_the_schedule_reaches_its_rate():
    """The rule against the schedule itself."""
    from longtail_experts.learning.schedule import lr_at

    for warmup_steps in range(12):
        for milestones in ((), (1,), (2,), (5,)):
            rates = [
                lr_at(
                    step,
                    lr=0.4,
                    lr_decay=0.1,
                    milestones=milestones,
                    warmup_steps=warmup_steps,
                    steps_per_epoch=4,
                )
                for step in range(3 * 4)
            ]
            finding = rules.warmup_rule(warmup_steps, 4, 3, milestones, 100)
            assert (finding.verdict == "warning") == (max(rates) < 0.4), (warmup_steps, milestones)


@pytest.mark.parametrize(
    ("milestones", "epochs", "verdict", "says"),
    [
        ((96, 192, 224), 256, "ok", ""),
        ((96, 192, 224), 225, "ok", ""),
        ((96, 192, 224), 224, "warning", "224 lie at or past epochs=224"),
        ((96, 192, 224), 100, "warning", "192,224 lie at or past epochs=100"),
        ((), 256, "note", "never falls"),
    ],
)
def test_milestones(milestones, epochs, verdict, says):
    finding = rules.milestones_rule(milestones, epochs)
    assert finding.verdict == verdict
    assert says in finding.message


@pytest.mark.parametrize(
    ("every", "epochs", "count", "verdict"),
    [
        (10, 256, 26, "ok"),
        (10, 50, 5, "ok"),
        (10, 40, 4, "note"),
        (10, 11, 2, "note"),
        (10, 10, 1, "warning"),
        (300, 256, 1, "warning"),
        (10, 1, 1, "note"),
    ],
)
def test_validation_cadence(every, epochs, count, verdict):
    by_hand = sum(e == epochs - 1 or (e + 1) % every == 0 for e in range(epochs))
    assert rules.num_validations(every, epochs) == by_hand == count
    assert rules.validation_rule(every, epochs).verdict == verdict


@pytest.mark.parametrize(
    ("patience", "every", "epochs", "starts_at", "verdict"),
    [
        (None, 10, 256, 224, "ok"),
        (3, 10, 256, 224, "ok"),
        (4, 10, 256, 224, "note"),
        (4, 10, 256, 0, "ok"),
        (24, 10, 256, 0, "ok"),
        (25, 10, 256, 0, "note"),  # the first of 26 validations is always better than none
        (1, 10, 256, 300, "note"),
        (2, 1, 3, 0, "note"),
        (1, 1, 3, 0, "ok"),
    ],
)
def test_patience_that_can_never_act(patience, every, epochs, starts_at, verdict):
    """After epoch 224, validations follow at 230, 240, 250 and 256: four."""
    assert rules.patience_rule(patience, every, epochs, starts_at).verdict == verdict
    # Accuracies that only fall: the soonest that it can act.
    selection = Selection(patience, starts_at)
    validated = [e for e in range(epochs) if e == epochs - 1 or (e + 1) % every == 0]
    acts = False
    for epoch in validated:
        acts |= selection.is_over
        selection.chooses(-epoch, epoch, epoch)
    assert acts == (verdict == "ok" and patience is not None)


@pytest.mark.parametrize(
    ("finding", "verdict", "says"),
    [
        (rules.weight_decay_rule(1e-4), "ok", ""),
        (rules.weight_decay_rule(5e-4), "note", "5 x"),
        (rules.weight_decay_rule(1e-3), "note", "10 x"),
        (rules.momentum_rule(0.9), "ok", ""),
        (rules.momentum_rule(0.95), "note", "2 x as far"),
        (rules.momentum_rule(0.0), "warning", "0.1 x as far"),
        (rules.momentum_rule(0.6), "note", "0.25 x as far"),
        (rules.momentum_rule(0.975), "note", "4 x as far"),
        (rules.momentum_rule(0.99), "warning", "10 x as far"),
        (rules.lr_decay_rule(0.1, (96,), "milestones"), "ok", ""),
        (rules.lr_decay_rule(1.0, (96,), "milestones"), "warning", "does not fall"),
        (rules.lr_decay_rule(1.0, (), "milestones"), "ok", ""),
        (rules.lr_decay_rule(1.0, (96,), "cosine"), "ok", ""),
        (rules.weight_decay_rule(2e-4), "note", "LDAM"),
        (rules.weight_decay_rule(0.0), "warning", "1e-4"),
        (rules.weight_decay_rule(1e-2), "warning", "1e-4"),
        (rules.batch_rule(128, 8677), "ok", "68 steps"),
        (rules.batch_rule(8676, 8677), "ok", "2 steps"),
        (rules.batch_rule(8677, 8677), "warning", "one step an epoch"),
        (rules.checkpoint_rule(10, 256), "ok", ""),
        (rules.checkpoint_rule(256, 256), "note", "a crash"),
        (rules.checkpoint_rule(10, 1), "ok", ""),
        (rules.loss_rule("all", 1.0), "note", "same function"),
        (rules.loss_rule("all", 1.5), "ok", ""),
        (rules.loss_rule("logit_adjust", 1.0), "ok", ""),
        (rules.tau_rule(1.0, "ce"), "ok", ""),
        (rules.tau_rule(1.5, "ce"), "note", "not used by ce"),
        (rules.tau_rule(1.0, "all"), "ok", ""),
        (rules.tau_rule(1.5, "logit_adjust"), "note", "Menon"),
        (rules.tau_rule(0.0, "all"), "warning", "is cross-entropy"),
        (rules.knob_rule("beta", 0.9, 0.9999, "ce"), "note", "not used by ce"),
        (rules.knob_rule("beta", 0.9999, 0.9999, "ce"), "ok", ""),
        (rules.knob_rule("beta", 0.9, 0.9999, "ldam_drw"), "ok", ""),
        (rules.knob_rule("gamma", 1.0, 2.0, "class_balanced"), "note", "not used by class_b"),
        (rules.knob_rule("gamma", 1.0, 2.0, "focal"), "ok", ""),
        (rules.precision_rule("cpu", "bf16", False), "warning", "slower"),
        (rules.precision_rule("cpu", "bf16", True), "ok", ""),
        (rules.precision_rule("cuda", "bf16", False), "ok", ""),
        (rules.source_rule("synthetic"), "note", "demonstration"),
        (rules.source_rule("cifar100"), "ok", ""),
        (rules.images_per_class_rule(10, "cifar100"), "note", "500"),
        (rules.images_per_class_rule(10, "images"), "ok", ""),
        (rules.images_per_class_rule(None, "cifar100"), "ok", ""),
        (rules.few_images_rule([400, 10, 10]), "ok", ""),
        (rules.few_images_rule([400, 9, 4]), "note", "2 of 3 classes have under 10 images"),
        (rules.absent_classes_rule({"train": 0, "calib": 0}, 100), "ok", ""),
        (rules.absent_classes_rule({"train": 0, "calib": 12}, 100), "note", "calib 12"),
        (rules.identical_images_rule(2, 200), "ok", ""),
        (rules.identical_images_rule(3, 200), "warning", "in more than one split"),
        (rules.room_rule("disk", 80, 100, "make room"), "ok", ""),
        (rules.room_rule("disk", 81, 100, "make room"), "warning", "make room"),
        (rules.room_rule("disk", 101, 100, "make room"), "blocking", "not enough: make room"),
    ],
)
def test_small_rules(finding, verdict, says):
    assert finding.verdict == verdict
    assert says in finding.message
    assert bool(finding.message) or verdict == "ok"


@pytest.mark.parametrize(
    ("finding", "field", "verdict", "says"),
    [
        (rules.warmup_rule(0, **FULL, warmup_epochs=5), "warmup_steps", "ok", "warmup_epochs=5"),
        (rules.warmup_epochs_rule(5, 200, (160, 180), 10847), "warmup_epochs", "ok", ""),
        (rules.warmup_epochs_rule(160, 200, (160, 180), 10847), "warmup_epochs", "ok", ""),
        (rules.warmup_epochs_rule(161, 200, (160,), 10847), "warmup_epochs", "blocking", "h 160"),
        (rules.warmup_epochs_rule(5, 4, (), 10847), "warmup_epochs", "warning", "epoch 4; give 4"),
        (rules.milestones_rule((96,), 256, "cosine"), "milestones", "note", "not used"),
        (rules.milestones_rule((), 256, "cosine"), "milestones", "ok", ""),
        (rules.milestones_rule((9, 96), 256, "cosine", True), "milestones", "note", "epoch 9"),
        (rules.milestones_rule((96,), 256, "milestones", True), "milestones", "ok", ""),
        (rules.protocol_rule("experts", "own"), "protocol", "ok", ""),
        (rules.protocol_rule("literature", "ldam"), "protocol", "note", "no hold-out"),
        (rules.protocol_rule("literature", "own"), "protocol", "note", "not LDAM's"),
        (rules.reweight_rule(None, "ce", 200, ()), "reweight_from", "ok", ""),
        (rules.reweight_rule(3, "ce", 200, ()), "reweight_from", "note", "not used by ce"),
        (rules.reweight_rule(None, "ldam_drw", 200, (160,)), "reweight_from", "ok", "epoch 160"),
        (rules.reweight_rule(None, "ldam_drw", 160, (160,)), "reweight_from", "warning", "never"),
        (rules.reweight_rule(None, "ldam_drw", 160, ()), "reweight_from", "warning", "deferred"),
        (rules.reweight_rule(0, "ldam_drw", 160, ()), "reweight_from", "ok", "epoch 0"),
        (rules.reweight_rule(199, "ldam_drw", 200, (160,)), "reweight_from", "ok", "epoch 199"),
    ],
)
def test_knobs_of_the_literature(finding, field, verdict, says):
    assert (finding.field, finding.verdict) == (field, verdict)
    assert says in finding.message
