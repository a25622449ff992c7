"""Training throughput: the loop that a torchvision user would write, beside this project's.

    python benchmarks/throughput.py                          # generated images
    python benchmarks/throughput.py --data_dir FOLDER --json # CIFAR-100; one JSON object
    python benchmarks/throughput.py --experts 3              # on a GPU: three at the same time

Both train the same ResNet-32 on the same images with the same batch size on the same device, in
turns of `--steps` steps, `--n` turns each, after steps that are not counted. The plain loop:
`DataLoader` with two workers, PIL transforms, eager float32, `torch.optim.SGD` as it comes. This
project's: what `main` would run for a training of `--planned_images` (layers compiled only where
that is long enough to repay it); what compiling took is reported beside the rate. Of
several experts, images of all are counted, and a step is one of each.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain, islice, repeat

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import transforms

from longtail_experts.config import Config, make_config
from longtail_experts.data.batches import MEAN, STD, batches_of, draw_epoch, loader_of
from longtail_experts.data.dataset import Dataset
from longtail_experts.learning.at_once import at_once, beside_the_others
from longtail_experts.learning.cost import peak_memory_bytes
from longtail_experts.learning.losses import Knobs, objective_of
from longtail_experts.learning.resnet import build_resnet32
from longtail_experts.learning.step import start_training, take_step
from longtail_experts.stages.inputs import load_dataset, resolve, trains_at_once

FULL_RECIPE = 256 * 8677  # images
WARM_UP = 3  # steps at the beginning of a turn
STEPS = {"cpu": 20, "cuda": 400}  # after them: long enough for the beginning of a turn not to show
RATES = [f"{loop}images_per_second{end}" for loop in ("", "plain_") for end in ("", "_min", "_max")]
REPORTED = ("device", "n", *RATES, "ratio", "ms_per_step", "peak_memory_bytes")


class AsPictures(torch.utils.data.Dataset):
    def __init__(self, pixels: Tensor, targets: Tensor):
        self.pictures = [Image.fromarray(p) for p in pixels.numpy()]
        self.targets = targets.tolist()
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.pictures[index]), self.targets[index]


class PlainLoop:
    def __init__(self, data: Dataset, batch_size: int, device: str):
        self.device = device
        self.loader = DataLoader(
            AsPictures(data.pixels("train"), data.targets("train")),
            batch_size=batch_size,
            shuffle=True,
            num_workers=2,
            drop_last=True,
            pin_memory=device == "cuda",
        )
        self.model = build_resnet32(data.num_classes, "projection", 0).to(device).train()
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4
        )
        self.loss = nn.CrossEntropyLoss()

    def steps(self) -> Iterator[None]:
        for images, targets in chain.from_iterable(repeat(self.loader)):
            images, targets = images.to(self.device), targets.to(self.device)
            self.optimizer.zero_grad()
            loss = self.loss(self.model(images), targets)
            loss.backward()
            self.optimizer.step()
            yield


class OurLoop:
    def __init__(
        self,
        data: Dataset,
        batch_size: int,
        device: str,
        precision: str,
        planned: int,
        fused: bool,
    ):
        model = build_resnet32(data.num_classes, "projection", 0)
        started = time.perf_counter()
        self.state = start_training(
            model,
            lr=0.01,
            momentum=0.9,
            weight_decay=1e-4,
            device=device,
            precision=precision,
            planned_images=planned,
            fused=fused,
        )
        self.seconds_to_compile = time.perf_counter() - started
        self.state.model.train()
        targets = data.targets("train")
        self.load = loader_of(data.pixels("train"), targets, device)
        self.num_images, self.full_batches = len(targets), len(targets) // batch_size
        counts = data.class_counts("train")
        self.objective = objective_of("ce", counts, Knobs(), device)
        self.batch_size, self.device, self.precision = batch_size, device, precision
        self.epoch = 0

    def steps(self) -> Iterator[None]:
        while True:
            self.epoch += 1
            draws = draw_epoch(self.num_images, 0, self.epoch, self.device)
            for batch in islice(batches_of(draws, self.batch_size), self.full_batches):
                take_step(self.state, batch, self.objective, 0.01, self.precision, self.load)
                yield


def rate(
    loops: Sequence[PlainLoop | OurLoop], num_steps: int, batch_size: int, device: str
) -> float:
    """Images a second over `num_steps` steps of each, after the first few of a new epoch; where
    they are more than an epoch has, of those that follow, what it takes to begin one included."""
    running = [loop.steps() for loop in loops]
    for steps in running:
        take(steps, WARM_UP)
    seconds = seconds_of(lambda: together(running, num_steps, device), device)
    for steps in running:
        steps.close()  # ends the workers: they would slow the other loop's turn
    return len(loops) * num_steps * batch_size / seconds


def take(steps: Iterator[None], num_steps: int) -> None:
    for _ in islice(steps, num_steps):
        pass


def together(running: list[Iterator[None]], num_steps: int, device: str) -> None:
    """A thread each, as `main -P loss=all` does it; one alone needs none."""

    def work(steps: Iterator[None]) -> None:
        with beside_the_others():
            take(steps, num_steps)

    if len(running) == 1:
        take(running[0], num_steps)
    else:
        at_once({str(i): partial(work, steps) for i, steps in enumerate(running)}, device)


def seconds_of(do: Callable[[], object], device: str) -> float:
    wait_for(device)
    started = time.perf_counter()
    do()
    wait_for(device)
    return time.perf_counter() - started


def wait_for(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def forget_peak(device: str) -> None:
    """Of memory held before; on a CPU the peak is that of the process."""
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


Found = dict[str, float | int | str]  # what is printed, by name


def common_options(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data_dir", help="folder with CIFAR-100; without: generated images")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--precision", default="auto", help="auto, fp32 or bf16")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--n", type=int, default=5, help="turns")
    parser.add_argument(
        "--steps", type=int, help=f"counted in a turn ({STEPS['cpu']}, on a GPU {STEPS['cuda']})"
    )
    parser.add_argument(
        "--planned_images",
        type=int,
        default=FULL_RECIPE,
        help="length of the training that this stands for; 0: one too short to compile for",
    )
    parser.add_argument("--fused", action="store_true", help="on a GPU: kernels of this project")
    parser.add_argument("--json", action="store_true", help="print JSON objects")
    return parser


def experts_in_training(
    options: argparse.Namespace, config: Config, data: Dataset, num_experts: int
) -> list[OurLoop]:
    how = (config.device, config.precision, options.planned_images, options.fused)
    return [OurLoop(data, options.batch_size, *how) for _ in range(num_experts)]


def load(options: argparse.Namespace) -> tuple[Config, Dataset]:
    config = resolve(
        make_config(
            {
                "source": "cifar100" if options.data_dir else "synthetic",
                "data_dir": options.data_dir,
                "device": options.device,
                "precision": options.precision,
            }
        )
    )
    options.steps = STEPS[config.device] if options.steps is None else options.steps
    if options.steps < 1:
        raise SystemExit(f"error: --steps={options.steps}: give at least 1")
    data = load_dataset(config)
    if data.size("train") < options.batch_size:
        raise SystemExit(
            f"error: --batch_size={options.batch_size}: there are {data.size('train')} images"
        )
    return config, data


def name_of(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


def spread(name: str, values: list[float]) -> Found:
    """The median under its own name, the least and the most beside it."""
    return {
        name: statistics.median(values),
        f"{name}_min": min(values),
        f"{name}_max": max(values),
    }


def show(found: Found) -> None:
    for name, value in found.items():
        print(f"{name:32} {value:,.2f}" if isinstance(value, float) else f"{name:32} {value}")


def measure(options: argparse.Namespace) -> Found:
    """What --json prints, and what else says how it came about."""
    config, data = load(options)
    if options.experts > 1 and not trains_at_once(config):
        raise SystemExit(f"error: --experts={options.experts}: on a CPU one trains after another")
    ours = experts_in_training(options, config, data, options.experts)
    loops = {"plain_": [PlainLoop(data, options.batch_size, config.device)], "": ours}
    rates: dict[str, list[float]] = {"": [], "plain_": []}
    for _ in range(options.n):
        for name, some in loops.items():
            rates[name].append(rate(some, options.steps, options.batch_size, config.device))
    found: Found = {
        "device": name_of(config.device),
        "threads": torch.get_num_threads(),
        "precision": config.precision,
        "step_path": ours[0].state.path,
        "experts": options.experts,
        "n": options.n,
        "steps": options.steps,
    }
    for name, values in rates.items():
        found |= spread(f"{name}images_per_second", values)
    middle = float(found["images_per_second"])
    return found | {
        "ratio": middle / float(found["plain_images_per_second"]),
        "ms_per_step": 1000 * options.experts * options.batch_size / middle,
        "seconds_to_compile": ours[0].seconds_to_compile,
        "peak_memory_bytes": peak_memory_bytes(config.device),  # of both loops together
    }


def main() -> None:
    parser = common_options(__doc__)
    parser.add_argument("--experts", type=int, default=1, help="at the same time, on a GPU")
    options = parser.parse_args()
    found = measure(options)
    if options.json:
        print(json.dumps({name: found[name] for name in REPORTED}))
        return
    show(found)


if __name__ == "__main__":
    main()
