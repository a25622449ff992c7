"""A sweep file -> the Config of every trial, before anything starts: no Ray, store or images."""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from longtail_experts.config import (
    Config,
    ConfigError,
    find_recipe,
    make_config,
    nearest,
    parse_mapping,
    read_recipe,
    read_text,
    shorten,
    to_text,
)
from longtail_experts.tracking.comparison import unused_fields

MOST_TRIALS = 10_000
Whole = Annotated[int, Field(ge=1, le=100_000, strict=True)]


class Sweep(BaseModel):
    """What a sweep file holds."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    config: str = Field(
        "cifar100_lt", min_length=1, description="the recipe that every trial starts from"
    )
    fixed: dict[str, Any] = Field({}, description="fields of the config for every trial")
    grid: dict[str, list[Any]] = Field(
        description="fields of the config, or config itself, with their values; the trials are "
        "the product of these"
    )
    trials_at_once: Whole | None = Field(
        None, description="at most so many trials at a time; none: as many as there is room for"
    )
    cpus_per_trial: Whole = Field(1, description="processor cores, and threads, of a trial")
    gpus_per_trial: float | None = Field(
        None,
        ge=0,
        le=64,
        description="share of a GPU that a trial takes; none: a third where there is a GPU",
    )

    @field_validator("trials_at_once", "gpus_per_trial", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        return None if value == "none" else value

    @field_validator("gpus_per_trial")
    @classmethod
    def _whole_above_one(cls, value: float | None) -> float | None:
        if value is not None and value > 1 and value != int(value):
            raise ValueError("must be whole where it is more than one")
        return value

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(), sort_keys=False, default_flow_style=None)


@dataclass(frozen=True)
class Point:
    """One trial of a grid: what the grid says of it, and its whole config."""

    fields: Mapping[str, str]
    config: Config

    @property
    def label(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.fields.items())


def read_sweep(name: str, overrides: Mapping[str, Any]) -> Sweep:
    """A sweep file by path or bare name, `fixed` overridden; ConfigError where it is no sweep."""
    path = find_recipe(name, "configs/sweeps", "sweep")
    what = f"sweep={path}"
    values = parse_mapping(read_text(path, what), what)
    for field in values:
        if field not in Sweep.model_fields:
            hint = nearest(str(field), list(Sweep.model_fields))
            if field in Config.model_fields:
                hint = "; a field of the config goes under `fixed:` or `grid:`"
            raise ConfigError(f"{what}: unknown field {shorten(field)!r}{hint}")
    _require_flat(values, what)
    try:
        sweep = Sweep.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{what}: {_one_line(error, values)}") from None
    for field in overrides:
        if field in sweep.grid:
            raise ConfigError(
                f"{field}={shorten(overrides[field])}: the grid of {path} varies it; change the "
                "grid there"
            )
    return sweep.model_copy(update={"fixed": {**sweep.fixed, **overrides}})


def points_of(sweep: Sweep) -> list[Point]:
    """The product of the grid, the last field varying fastest; ConfigError about the first value
    that is wrong, about trials that are the same, or about too many."""
    if not sweep.grid:
        raise ConfigError("grid={}: give a field and its values, as in {seed: [0, 1, 2]}")
    for name, values in sweep.grid.items():
        if not values:
            raise ConfigError(f"grid: {shorten(name)}=[]: give at least one value")
        if name in sweep.fixed:
            raise ConfigError(f"{shorten(name)}: is both under `fixed:` and in the grid; take one")
    number = math.prod(map(len, sweep.grid.values()))
    if number > MOST_TRIALS:
        raise ConfigError(f"grid: {number:,} trials; at most {MOST_TRIALS:,}: leave values out")
    recipes: dict[str, dict[str, Any]] = {}
    points, seen, trained = [], {}, {}
    for values in itertools.product(*sweep.grid.values()):
        varied = dict(zip(sweep.grid, values, strict=True))
        recipe = str(varied.pop("config", sweep.config))
        if recipe not in recipes:
            recipes[recipe] = make_config(read_recipe(find_recipe(recipe))).model_dump()
        given = make_config(recipes[recipe] | sweep.fixed | varied)
        if given.loss == "all":
            where = "in the grid, loss" if "loss" in varied else "under `grid:`, loss"
            raise ConfigError(
                f"loss=all: a trial is one expert; {where}: [ce, logit_adjust, balanced_softmax]"
            )
        config = without_unused(given)
        texts = config.as_text() | {"config": recipe}
        point = Point({name: texts[name] for name in sweep.grid}, config)
        twin = seen.setdefault((given.sha256, given.data_dir), point)
        if twin is not point:
            raise ConfigError(
                f"grid: two trials are the same ({twin.label}; {point.label}): leave one out"
            )
        if trained.setdefault((config.sha256, config.data_dir), point) is point:
            points.append(point)
    if any(point.config.expert_seed is not None for point in points) and "seed" in sweep.grid:
        raise ConfigError("grid: seed: acts through expert_seed, which is given too; take one")
    ldam = any(point.config.subset_rule == "ldam" for point in points)
    if ldam and len(sweep.grid.get("split_seed", ())) > 1:
        raise ConfigError(
            "grid: split_seed: subset_rule=ldam has the same training images at every split_seed; "
            "vary seed, or give subset_rule: own"
        )
    return points


def without_unused(config: Config) -> Config:
    """The same training with fields at their defaults that it does not look at, so that a grid
    over tau trains ce once."""
    unused = unused_fields(config.loss, config.as_text())
    return config.replace(**{name: Config.model_fields[name].default for name in unused})


def _require_flat(values: Mapping[Any, Any], what: str) -> None:
    """A few lines of nested anchors print as gigabytes: nothing deeper than a grid goes further."""
    for field, value in values.items():
        depth = {"fixed": 2, "grid": 3}.get(field, 0)
        wanted = {"fixed": "`name: value` lines", "grid": "`name: [value, value]` lines"}
        if depth and not isinstance(value, dict):
            raise ConfigError(f"{what}: {field}: must hold {wanted[field]}")
        if _deeper_than(value, depth):
            raise ConfigError(f"{what}: {field}: must hold {wanted.get(field, 'one value')}")
        for name, part in value.items() if depth else ():
            if not isinstance(name, str):
                raise ConfigError(f"{what}: {field}: {shorten(name)} is no field of the config")
            if field == "grid" and not isinstance(part, list):
                raise ConfigError(
                    f"{what}: grid: {shorten(name)}={shorten(part)}: give a list of values, or "
                    "put it under `fixed:`"
                )


def _deeper_than(value: Any, depth: int) -> bool:
    """Whether lists and mappings are nested more than `depth` deep, or are of another kind."""
    if isinstance(value, set | tuple | bytes):
        return True
    if not isinstance(value, dict | list):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return depth == 0 or any(_deeper_than(part, depth - 1) for part in inner)


def _one_line(error: ValidationError, values: Mapping[str, Any]) -> str:
    first = error.errors()[0]
    name = str(first["loc"][0])
    says = first["msg"].removeprefix("Input ").removeprefix("Value error, ")
    if first["type"] == "missing":
        return f"{name}: is missing ({Sweep.model_fields[name].description})"
    given = to_text(values[name]) if not isinstance(values[name], dict | list) else "..."
    says = says[0].lower() + says[1:]
    return f"{name}={shorten(given)}: {says} ({Sweep.model_fields[name].description})"
