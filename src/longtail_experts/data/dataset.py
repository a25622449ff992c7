"""Images and the splits of them, together: what training and evaluation read."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from longtail_experts.data.longtail import class_groups
from longtail_experts.data.sources import ImageData
from longtail_experts.data.splits import Splits, manifest, split_images


@dataclass(frozen=True)
class Dataset:
    images: ImageData
    splits: Splits

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """splits/manifest.json."""
        return manifest(self.splits, self.images)

    @property
    def num_classes(self) -> int:
        return len(self.images.class_names)

    @property
    def groups(self) -> dict[str, Tensor]:
        """bool [C] for each of head, tail, many, medium, few."""
        masks = class_groups(self.splits.pool_counts)
        return {name: torch.from_numpy(mask) for name, mask in masks.items()}

    @property
    def split_names(self) -> tuple[str, ...]:
        return self.splits.names

    @property
    def num_rows(self) -> int:
        """Of all splits; an image of test_lt is in test_balanced too."""
        return sum(map(self.size, self.split_names))

    def size(self, split: str) -> int:
        return len(self.splits.indices[split])

    def pixels(self, split: str) -> Tensor:
        """uint8 [N, 32, 32, 3], in the order of the split's indices."""
        images, _ = split_images(split, self.images)
        return torch.from_numpy(images[self.splits.indices[split]])

    def targets(self, split: str) -> Tensor:
        """int64 [N]."""
        _, labels = split_images(split, self.images)
        return torch.from_numpy(labels[self.splits.indices[split]])

    def targets_if_any(self, split: str) -> Tensor | None:
        return self.targets(split) if split in self.split_names else None

    def class_counts(self, split: str) -> Tensor:
        """int64 [C]."""
        return torch.bincount(self.targets(split), minlength=self.num_classes)
