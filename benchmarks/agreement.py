"""Whether experts that this project's kernels train on a GPU are those that PyTorch's would.

    python benchmarks/agreement.py --data_dir FOLDER --seeds 4 --epochs 32

First what one step brings to each kind of layer (a convolution with the batch norm before it, or
either alone), in bf16: how far the kernels' results, and PyTorch's own, are from float64's, as
shares of their length. Then training: every loss with every seed, once with `fused` and once
without, the three losses at the same time as `main -P loss=all` has them; the recipe is that of
`cifar100_lt`, its milestones moved in proportion to the epochs.
What counts is balanced accuracy on all 10,000 test images, and T fitted on calib. Two runs of a
seed share first weights, order and augmentation, but rounding parts them soon: differences are
those of independent runs.
"""

import argparse
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable
from functools import partial
from itertools import product

import torch
from torch import nn

from longtail_experts.config import LOSS_NAMES, Config, load_config
from longtail_experts.data.batches import draw_epoch
from longtail_experts.data.dataset import Dataset
from longtail_experts.learning.at_once import at_once, beside_the_others
from longtail_experts.learning.fused import fused, how_far_from_float64, layers_in
from longtail_experts.learning.losses import prior_of
from longtail_experts.learning.metrics import mean_over
from longtail_experts.learning.step import autocast, train_epoch
from longtail_experts.stages.calibrate import fit, recalls, split_logits
from longtail_experts.stages.inputs import (
    batches_of_training,
    build_network,
    for_one_expert,
    load_dataset,
    log_offset_of,
    objective_at,
    resolve,
    schedule_of,
    state_before_training,
    steps_an_epoch,
)

RECIPE = "cifar100_lt"
Found = dict[str, float | int | str]


def config_of(options: argparse.Namespace, seed: int, is_fused: bool) -> Config:
    recipe = load_config(RECIPE, {})
    milestones = [m * options.epochs // recipe.epochs for m in recipe.milestones]
    changes = {"data_dir": options.data_dir, "seed": seed, "fused": is_fused}
    if options.data_dir is None:
        changes["source"] = "synthetic"
    return resolve(recipe.replace(epochs=options.epochs, milestones=milestones, **changes))


def layers_apart(config: Config, data: Dataset) -> Iterable[Found]:
    """A row for each kind of layer and each of its results."""
    config = for_one_expert(config, "ce")
    state = state_before_training(build_network(config, data), config, data)
    batches, load = batches_of_training(config, data)
    batch = next(batches(draw_epoch(data.size("train"), config.expert_seed, 0, config.device)))
    images, _ = load(*batch)
    state.model.train()

    def run() -> None:
        with autocast(config.device, config.precision):
            state.model(images)

    for module, inputs in layers_in(state.model, run).values():
        theirs = how_far_from_float64(module, inputs)
        for name, ours in how_far_from_float64(module, inputs, fused).items():
            yield {
                "layer": " ".join(str(module).split()),
                "shape": " ".join(str(tuple(x.shape)) for x in inputs),
                "result": name,
                "fused": ours,
                "pytorch": theirs[name],
            }


def measured(network: nn.Module, config: Config, data: Dataset) -> Found:
    """Of an expert after its last epoch."""
    logits = split_logits(network, config, data)
    recall, _ = recalls(logits, data)["test_balanced"]
    prior = prior_of(data.class_counts("train"))
    fitted = fit(logits, config, data, log_offset_of(config, data, config.epochs - 1), prior)
    return {"balanced": 100 * mean_over(recall), "temperature": fitted.temperature.value}


def reached(config: Config, data: Dataset) -> dict[str, Found]:
    """Balanced accuracy on test_balanced in %, and T, by loss."""

    def train(loss: str) -> Found:
        one = for_one_expert(config, loss)
        state = state_before_training(build_network(one, data), one, data)
        batches, load = batches_of_training(one, data)
        lr_of = schedule_of(one, steps_an_epoch(one, data))

        def take(epochs: Iterable[int]) -> None:
            for epoch in epochs:
                draws = draw_epoch(data.size("train"), one.expert_seed, epoch, one.device)
                train_epoch(
                    state,
                    batches(draws),
                    objective=objective_at(epoch, one, data),
                    lr_at=lr_of,
                    precision=one.precision,
                    load=load,
                )

        take(range(1))  # in turn: steps are recorded
        with beside_the_others():
            take(range(1, one.epochs))
        expected = "fused" if one.fused else "graph"
        if state.path != expected:
            raise SystemExit(f"error: {loss} took {state.path} steps instead of {expected} ones")
        return measured(state.model, one, data)

    return at_once({loss: partial(train, loss) for loss in LOSS_NAMES}, config.device)


def comparison(fused_: list[float], pytorch: list[float]) -> Found:
    """Means, and the difference of pairs with its standard error."""
    differences = [ours - theirs for ours, theirs in zip(fused_, pytorch, strict=True)]
    return {
        "n": len(differences),
        "fused": statistics.mean(fused_),
        "pytorch": statistics.mean(pytorch),
        "difference": statistics.mean(differences),
        "standard_error": statistics.stdev(differences) / math.sqrt(len(differences)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data_dir", help="folder with CIFAR-100; without: generated images")
    parser.add_argument("--seeds", type=int, default=4, help="how many (4)")
    parser.add_argument("--epochs", type=int, default=32, help="of each training (32)")
    parser.add_argument("--json", action="store_true", help="print JSON objects")
    options = parser.parse_args()
    if options.seeds < 2:
        raise SystemExit(f"error: --seeds={options.seeds}: a difference needs 2 for its error")
    if options.epochs < 8:
        raise SystemExit(f"error: --epochs={options.epochs}: the recipe's milestones need 8")
    config = config_of(options, 0, True)
    if config.device != "cuda":
        raise SystemExit("error: there is no GPU here, and nothing is fused")
    data = load_dataset(config)

    def show(found: Found) -> None:
        if options.json:
            print(json.dumps(found), flush=True)
        else:
            print(*(f"{v:.3g}" if isinstance(v, float) else v for v in found.values()), flush=True)

    show({"device": torch.cuda.get_device_name(), "precision": config.precision})
    for row in layers_apart(config, data):
        show(row)
    found: dict[tuple[bool, str, str], list[float]] = defaultdict(list)
    for seed, way in product(range(options.seeds), (True, False)):
        for loss, values in reached(config_of(options, seed, way), data).items():
            show({"loss": loss, "seed": seed, "fused": str(way), **values})
            for measure, value in values.items():
                found[way, loss, measure].append(value)
                found[way, "all", measure].append(value)
    for loss, measure in product((*LOSS_NAMES, "all"), ("balanced", "temperature")):
        pairs = found[True, loss, measure], found[False, loss, measure]
        show({"loss": loss, "measure": measure, **comparison(*pairs)})


if __name__ == "__main__":
    main()
