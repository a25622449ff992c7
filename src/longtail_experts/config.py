"""Every knob of the project: one frozen, validated model, read from YAML and overrides.

The same flat names serve YAML files, `-P name=value`, `--name value` and MLflow params. Lists
are written `96,192,224`; off is `none`.
"""

import difflib
import hashlib
import os
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

# What a command to type begins with. MLflow calls an environment that it made itself mlflow-...; in
# one of the user's own it has to be told to stay.
_IN_MLFLOWS_OWN = Path(sys.prefix).name.startswith("mlflow-")
MLFLOW_RUN = "mlflow run ." + ("" if _IN_MLFLOWS_OWN else " --env-manager local")
LOSS_NAMES = ("ce", "logit_adjust", "balanced_softmax")  # of loss=all


# What changes none of an expert's figures: where the images lie (splits_sha256 knows which they
# are), what computes, what is checked before a training and where it is registered after it.
CHANGES_NO_FIGURE = ("data_dir", "device", "preflight", "register_as")


class ConfigError(ValueError):
    """A field, its value and what to do about it, in one line."""


Count = Annotated[int, Field(ge=1, le=10**9)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]


class Config(BaseModel):
    """What decides a run. Fields are described where `--help` shows them."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    loss: Literal[
        "ce",
        "logit_adjust",
        "balanced_softmax",
        "class_balanced",
        "focal",
        "ldam_drw",
        "all",
    ] = Field(
        "ce",
        description="what the expert is trained under; all: ce, logit_adjust and balanced_softmax",
    )
    tau: float = Field(1.0, ge=0, le=10, description="strength of logit_adjust (0 is ce)")
    beta: float = Field(
        0.9999, ge=0, lt=1, description="of the effective number (class_balanced, ldam_drw)"
    )
    gamma: float = Field(2.0, ge=0, le=10, description="focusing of focal (0 is ce)")
    reweight_from: int | None = Field(
        None,
        ge=0,
        le=10**9,
        description="epoch from which ldam_drw weighs classes; none: the first milestone, under a "
        "cosine as well; without one, the first epoch",
    )
    protocol: Literal["experts", "literature"] = Field(
        "experts",
        description="experts: six splits, checkpoint selected on val_lt, temperature on calib; "
        "literature: train on the whole pool, test on all test images, last epoch, temperature "
        "cross-fitted on the test images",
    )
    source: Literal["cifar100", "cifar10", "images", "synthetic"] = Field(
        "cifar100",
        description="where images come from: CIFAR-100 or CIFAR-10 (official files, parquet or "
        "download), a folder train/<class>/*, test/<class>/*, or generated ones for demos",
    )
    data_dir: str | None = Field(
        "data",
        min_length=1,
        description="folder with the images (CIFAR is downloaded there if its files are not)",
    )
    imbalance_factor: float = Field(
        100.0, ge=1, le=1e6, description="largest class / smallest class of the training pool"
    )
    imbalance_profile: Literal["exp", "step", "natural"] = Field(
        "exp",
        description="how counts fall with the class: exponentially, in one step, or as the "
        "images come (natural ignores imbalance_factor)",
    )
    images_per_class: Count | None = Field(
        None,
        description="pool images of the largest class; none: all of a class of CIFAR (500, or "
        "5,000 of CIFAR-10), or a folder's largest class "
        "(synthetic: also how many are generated)",
    )
    subset_rule: Literal["own", "ldam"] = Field(
        "own",
        description="which images of a class are in the pool: drawn by split_seed, or the subset "
        "of LDAM's code (official files only)",
    )
    split_seed: Seed = Field(
        42,
        description="decides which image falls in which split (of LDAM's subset: which test image "
        "alone; the pool's are always the same)",
    )
    seed: Seed = Field(0, description="expert_seed is derived from it and the loss")
    expert_seed: Seed | None = Field(
        None, description="weights, order and augmentation; none: derived from seed and loss"
    )
    shortcut: Literal["projection", "pad"] = Field(
        "projection",
        description="ResNet shortcut: 1x1 convolution (472,756 parameters), or none (470,004)",
    )
    epochs: Count = Field(256, description="passes over the train split")
    batch_size: Count = Field(128, description="images a step; the last one of an epoch is short")
    augmentation: Literal["plain", "autoaugment", "randaugment"] = Field(
        "plain",
        description="beside crop and flip: nothing, AutoAugment's policy for CIFAR-10, or "
        "RandAugment (2 operations at level 9 of 30)",
    )
    cutout: int = Field(
        0, ge=0, le=32, description="side in pixels of the square blanked in an image; 0: none"
    )
    mixup: float = Field(
        0.0, ge=0, le=10, description="mix images and losses by shares of Beta(mixup, mixup); 0: no"
    )
    lr: float = Field(0.4, gt=0, le=100, description="learning rate after warm-up")
    momentum: float = Field(0.9, ge=0, lt=1, description="of SGD")
    weight_decay: float = Field(1e-4, ge=0, le=1, description="L2 penalty on all parameters")
    milestones: tuple[int, ...] = Field(
        (96, 192, 224), description="epochs at which the learning rate is multiplied by lr_decay"
    )
    lr_decay: float = Field(0.1, gt=0, le=1, description="factor at each milestone")
    lr_schedule: Literal["milestones", "cosine"] = Field(
        "milestones", description="how the rate falls: at milestones, or as a half cosine to 0"
    )
    warmup_steps: int = Field(
        68, ge=0, le=10**9, description="steps of linear warm-up (68: one epoch of the full recipe)"
    )
    warmup_epochs: int = Field(
        0,
        ge=0,
        le=10**6,
        description="epochs of a warm-up in steps of whole epochs, as LDAM's code has it: lr * e / "
        "warmup_epochs in epoch e = 1, 2, ...; needs warmup_steps=0",
    )
    validation_every: Count = Field(10, description="epochs between validations on val_lt")
    early_stopping_patience: Count | None = Field(
        None,
        description="validations without a better balanced accuracy before stopping, counted "
        "after the last milestone (ldam_drw: and once it weighs classes); none: never",
    )
    checkpoint_every: Count = Field(10, description="epochs between copies of last.pt")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where to compute")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto",
        description="of the training's forward and backward pass; auto: bf16 on a GPU and on "
        "processors with bf16 instructions. Exported logits are always fp32",
    )
    fast: bool = Field(
        True,
        description="on a GPU, replay the training step, and forward passes, as CUDA graphs; on a "
        "CPU, where the run is long enough to repay it, compile layers (takes a C++ "
        "compiler); false: PyTorch's own operators always",
    )
    fused: bool = Field(
        False,
        description="on a GPU, in replayed steps: kernels of this project, two to three times "
        "as fast as PyTorch's; every kind of layer is compared with PyTorch's before, and six "
        "experts were 1.3 points worse to 0.9 better than a CPU's (benchmarks/README.md)",
    )
    register_as: str | None = Field(
        None,
        max_length=200,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_. -]*$",
        description="name in the model registry under which the calibrated expert becomes a "
        "version, and `champion` if it is the first, or better on val_lt than the champion of "
        "the same splits; none: not registered",
    )
    preflight: bool = Field(
        True,
        description="check recipe, data and disk before main starts, and stop where they are not "
        "ready; false: start at once",
    )

    @model_validator(mode="before")
    @classmethod
    def _plain_values(cls, values: Any) -> Any:
        for name, value in values.items():
            if name in cls.model_fields and cls.model_fields[name].annotation is bool:
                continue
            if any(isinstance(v, bool) for v in (value if isinstance(value, list) else [value])):
                raise ConfigError(f"{name}={shorten(value).lower()}: not a yes/no field")
        return {name: None if value == "none" else value for name, value in values.items()}

    @field_validator("data_dir")
    @classmethod
    def _utf8(cls, value: str | None) -> str | None:
        if value is None:
            return None
        return expanded(value)

    @field_validator("milestones", mode="before")
    @classmethod
    def _split_list(cls, value: Any) -> Any:
        if value is None or value == "":
            return ()
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(","))
        return (value,) if isinstance(value, int) else value

    @field_validator("milestones")
    @classmethod
    def _increasing(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if any(later <= earlier for earlier, later in zip((0, *value), value, strict=False)):
            raise ValueError("must be positive epochs in increasing order, as in 96,192,224")
        return value

    @field_validator("mixup")
    @classmethod
    def _has_shares(cls, value: float) -> float:
        if 0 < value < 1e-3:  # every share is 0 or 1, and in the end not a number
            raise ValueError("must be 0 (off), or from 0.001 to 10")
        return value

    @model_validator(mode="after")
    def _one_seed_one_expert(self) -> "Config":
        if self.loss == "all" and self.expert_seed is not None:
            raise ConfigError(
                f"expert_seed={self.expert_seed}: with loss=all each expert has its own; "
                "give seed, from which they are derived"
            )
        return self

    @model_validator(mode="after")
    def _one_warm_up(self) -> "Config":
        if self.warmup_epochs and self.warmup_steps > 1:
            raise ConfigError(
                f"warmup_epochs={self.warmup_epochs}: there is warmup_steps={self.warmup_steps} "
                "already; give one of them and 0 for the other"
            )
        return self

    @model_validator(mode="after")
    def _protocol_fits(self) -> "Config":
        if self.protocol == "literature" and self.early_stopping_patience is not None:
            raise ConfigError(
                f"early_stopping_patience={self.early_stopping_patience}: protocol=literature has "
                "no validation split to stop by; give none"
            )
        if self.protocol == "literature" and self.register_as is not None:
            raise ConfigError(
                f"register_as={self.register_as}: a champion is chosen on val_lt, which "
                "protocol=literature does not have; give none"
            )
        if self.subset_rule == "ldam" and self.source not in ("cifar100", "cifar10"):
            raise ConfigError(
                f"subset_rule=ldam: is a subset of CIFAR's official files, not of source="
                f"{self.source}; give own"
            )
        return self

    @model_validator(mode="after")
    def _size_is_heeded(self) -> "Config":
        generated = self.source == "synthetic"  # where it says how many there are
        if self.images_per_class and self.imbalance_profile == "natural" and not generated:
            raise ConfigError(
                f"images_per_class={self.images_per_class}: imbalance_profile=natural takes all "
                "training images; give none, or exp or step"
            )
        return self

    def replace(self, **changes: Any) -> "Config":
        """A validated copy with some fields changed."""
        return make_config(self.model_dump() | changes)

    def as_text(self) -> dict[str, str]:
        """Every field as MLflow params, flags and YAML write it."""
        return {name: to_text(value) for name, value in self.model_dump().items()}

    @property
    def sha256(self) -> str:
        """Of every field that can change a figure, as text; of one expert's resolved config it
        says, with the splits' hash and that of the code, which training this is."""
        lines = [f"{k}={v}\n" for k, v in self.as_text().items() if k not in CHANGES_NO_FIGURE]
        return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()

    def to_yaml(self) -> str:
        values = self.model_dump()
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
        return yaml.safe_dump(plain, sort_keys=False, default_flow_style=None)


def expanded(path: str) -> str:
    """A path as it was given, `~` replaced; ValueError where it is no name of a file."""
    if "\0" in path or path != path.encode(errors="replace").decode():
        raise ValueError("must be UTF-8 text without null characters")
    return os.path.expanduser(path)


def to_text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "none"
    if isinstance(value, float) and value.is_integer():
        return str(int(value)) if abs(value) < 1e15 else repr(value)
    return str(value)


def nearest(name: str, valid: list[str]) -> str:
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; one of: {', '.join(valid)}"


def shorten(value: Any, limit: int = 60) -> str:
    """One printable line for an error message, whatever was given."""
    try:
        text = str(value)
    except ValueError:  # an integer of thousands of digits
        text = f"a {type(value).__name__} too long to print"
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)"


def make_config(values: Mapping[str, Any]) -> Config:
    """A Config of these values, or a ConfigError about the first field that is wrong."""
    for name in values:
        if name not in Config.model_fields:
            raise ConfigError(
                f"unknown field {shorten(name)!r}{nearest(str(name), list(Config.model_fields))}"
            )
    try:
        return Config.model_validate(dict(values))
    except ValidationError as error:
        raise ConfigError(_one_line(error, values)) from None


def _one_line(error: ValidationError, values: Mapping[str, Any]) -> str:
    first = error.errors()[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, ConfigError):
        return str(cause)
    name = str(first["loc"][0])
    says = str(cause) if cause else first["msg"].removeprefix("Input ")
    says = says[0].lower() + says[1:]
    given = values[name]
    if first["type"] == "literal_error":
        says += nearest(shorten(given), list(get_args(Config.model_fields[name].annotation)))
    if first["type"] == "string_type":
        says += ", in quotes"
    if get_origin(Config.model_fields[name].annotation) is tuple and isinstance(given, list):
        given = to_text(tuple(given))
    return f"{name}={shorten(given)}: {says} ({Config.model_fields[name].description})"


def find_recipe(name: str, under: str = "configs", field: str = "config") -> Path:
    """The file of a config given by path or by bare name.

    A bare name is looked up in ./configs, then in the copy that came with the package; sweep
    files likewise, `under` configs/sweeps.
    """
    name, package = os.path.expanduser(name), Path(__file__).resolve().parent
    folders = (Path(under), package / under, package.parents[1] / under)
    candidates = [Path(name)] if name.endswith((".yaml", ".yml")) or "/" in name else []
    candidates += [folder / f"{name}.yaml" for folder in folders]
    for path in candidates:
        if _is_file(path):
            return path
    known = sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})
    raise ConfigError(f"{field}={shorten(name)}: no such file{nearest(name, known)}")


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name too long for the file system, or with a null byte
        return False


MAX_RECIPE = 100_000  # characters


def read_recipe(path: Path) -> dict[str, Any]:
    return parse_recipe(read_text(path, f"config={path}"), f"config={path}")


def read_text(path: Path, what: str) -> str:
    """At most MAX_RECIPE characters and one, which is too many."""
    try:
        with path.open(encoding="utf-8") as file:
            return file.read(MAX_RECIPE + 1)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{what}: cannot be read: {shorten(error, 200)}") from None


class DecimalLoader(yaml.SafeLoader):
    """Numbers and truth as on a command line: YAML 1.1 takes 010 for 8, 1:30 for 90, `no` for
    false."""


def _decimal(number: type) -> Callable[[DecimalLoader, yaml.ScalarNode], Any]:
    def construct(_: DecimalLoader, node: yaml.ScalarNode) -> Any:
        try:
            return number(node.value)
        except ValueError:  # whoever takes it will say that this is no number
            return node.value

    return construct


def _truth(_: DecimalLoader, node: yaml.ScalarNode) -> Any:
    return {"true": True, "false": False}.get(node.value, node.value)


DecimalLoader.add_constructor("tag:yaml.org,2002:bool", _truth)
DecimalLoader.add_constructor("tag:yaml.org,2002:int", _decimal(int))
DecimalLoader.add_constructor("tag:yaml.org,2002:float", _decimal(float))


def parse_mapping(text: str, what: str) -> dict[Any, Any]:
    """What a YAML file of `name: value` lines holds, however deep."""
    if len(text) > MAX_RECIPE:
        raise ConfigError(f"{what}: longer than {MAX_RECIPE:,} characters")
    try:
        root, values = yaml.compose(text, DecimalLoader), yaml.load(text, DecimalLoader)
    except (ValueError, TypeError, OverflowError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{what}: cannot be read: {shorten(error, 200)}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{what}: must hold `field: value` lines")
    _require_given_once(root, what)
    for name, inner in root.value:
        if isinstance(inner, yaml.MappingNode):
            _require_given_once(inner, f"{what}: {shorten(name.value)}")
    return values


def _require_given_once(mapping: yaml.MappingNode, what: str) -> None:
    given = Counter(name.value for name, _ in mapping.value if isinstance(name, yaml.ScalarNode))
    for name, times in given.items():
        if times > 1:
            raise ConfigError(f"{what}: {shorten(name)}: given {times} times")


def parse_recipe(text: str, what: str) -> dict[str, Any]:
    """`field: value` lines of YAML; a value is a word, a number, or a list of those."""
    values = parse_mapping(text, what)
    for name, value in values.items():
        parts = value if isinstance(value, list) else [value]
        # A few lines of nested anchors print as gigabytes: nothing nested gets further.
        if len(parts) > 1000 or any(isinstance(part, list | dict | set | tuple) for part in parts):
            raise ConfigError(f"{what}: {shorten(name)}: must be one value or a flat list")
    return values


def load_config(name: str, overrides: Mapping[str, Any]) -> Config:
    """The recipe `name` with some fields overridden; raises ConfigError."""
    path = find_recipe(name)
    try:
        recipe = make_config(read_recipe(path))
    except ConfigError as error:
        prefix = f"config={path}: "
        raise ConfigError(f"{prefix}{str(error).removeprefix(prefix)}") from None
    return make_config(recipe.model_dump() | dict(overrides))
