"""docs/results.md: sweeps beside published figures, in words and tables."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import yaml

from longtail_experts.config import MLFLOW_RUN, ConfigError, make_config, parse_mapping
from longtail_experts.tracking import report
from longtail_experts.tracking.comparison import WHERE_TRAINED
from longtail_experts.tracking.comparison_report import markdown, plain
from longtail_experts.tracking.expert_report import repeat_command
from longtail_experts.tracking.identity import shortened
from longtail_experts.tracking.published import APPLIES_TO, PUBLISHED
from longtail_experts.tracking.runs import Run, malformed
from longtail_experts.tracking.study import (
    CHANCE,
    KNOBS,
    SPLITS_FOLLOW_FROM,
    Study,
    Trial,
    natural,
)
from longtail_experts.tracking.study_report import (
    how_to_read,
    notice_of,
    sections_of,
    summary,
)
from longtail_experts.tracking.sweeps import RECIPE_EPOCHS, full_epochs

MARK = "<!-- Written by the command"  # by which a page of ours is known
FULL_EPOCHS = {"experts": 256, "literature": 200}  # of the recipe of each protocol
DATASETS = {"cifar100": "CIFAR-100-LT", "cifar10": "CIFAR-10-LT"}
PROTOCOLS = {
    "experts": "trained on 80 % of the long-tailed pool; the checkpoint is chosen on `val_lt`, the "
    "temperature fitted on `calib`; tested on the images that are not in `val_lt`. Nothing is "
    "selected on images that are reported on",
    "literature": "trained on the whole long-tailed pool and tested on all test images, as most of "
    "the literature does; the last epoch, nothing is selected. There is no hold-out: the "
    "temperature is two-fold cross-fitted on the test images under the uniform prior, each half "
    "scored with that of the other; T in the table is fitted on all of them",
}
SUBSETS = {
    "own": "**own subset**: drawn by `split_seed`, not the images of LDAM's code",
    "ldam": "**LDAM's subset**: the images that its code takes (`np.random.seed(0)`), as most of "
    "the literature does",
}


@dataclass(frozen=True)
class Setting:
    """What a sweep's run and its trials hold beside fields and metrics."""

    sweep_id: str
    grid: str  # sweep.yaml; empty where there is none
    sizes: Mapping[str, int]  # images: pool, train, test_balanced; empty where not recorded
    full_epochs: Mapping[str, int]  # of the recipes that it names, by protocol


def read_setting(study: Study) -> Setting:
    (sweep_id,) = study.run_ids
    sweep, content, shown = Run(sweep_id), {}, ""
    if sweep.has_artifact("sweep.yaml"):
        with malformed(f"run {sweep_id}: sweep.yaml"):
            content = parse_mapping(sweep.read_text("sweep.yaml"), "sweep.yaml")
            grid = without_folders(content)
            shown = yaml.safe_dump(grid, sort_keys=False, default_flow_style=None).strip()
    return Setting(sweep_id, shown, sizes_of(study), epochs_of_recipes(sweep, content))


def without_folders(sweep: Mapping[str, Any]) -> dict[str, Any]:
    """A sweep's file less where things lay on that machine: nobody's business, and of no use
    elsewhere."""

    def shown(name: str, value: Any) -> Any:
        if isinstance(value, list):
            return [shown(name, one) for one in value]
        if isinstance(value, dict):
            return {of: shown(of, one) for of, one in value.items()}
        if name == "config" and PurePath(str(value)).is_absolute():
            return PurePath(str(value)).name
        return "<images>" if name == "data_dir" and value not in (None, "none") else value

    return shown("", dict(sweep))


def epochs_of_recipes(sweep: Run, content: Mapping[str, Any]) -> dict[str, int]:
    """As the sweep recorded them; of an older one, by the recipes that are here under the names
    that it gives."""
    try:
        return {str(k): int(v) for k, v in json.loads(sweep.tags[RECIPE_EPOCHS]).items()}
    except (LookupError, AttributeError, TypeError, ValueError, OverflowError, RecursionError):
        return full_epochs(content)


def sizes_of(study: Study) -> dict[str, int]:
    """Of the splits of all trainings; {} where they differ, or no manifest is to be had."""
    if any(len(values_of(study, n)) > 1 for n in SPLITS_FOLLOW_FROM if n != "split_seed"):
        return {}
    first = Run(study.trials[0].run_id)
    if not first.has_artifact("splits/manifest.json"):
        return {}
    with malformed(f"run {first.run_id}: splits/manifest.json"):
        manifest = first.read_json("splits/manifest.json")
        sizes = {name: int(manifest["splits"][name]["size"]) for name in ("train", "test_balanced")}
        return {"pool": sum(map(int, manifest["pool_counts"])), **sizes}


def values_of(study: Study, name: str) -> list[str]:
    """Different ones of a field, in order."""
    return sorted({trial.fields.get(name, "-") for trial in study.trials}, key=natural)


def joined(study: Study, name: str) -> str:
    return " / ".join(values_of(study, name))


def short_schedules(study: Study, full: Mapping[str, int]) -> list[str]:
    """`64 of 256` for every protocol and number of epochs below that of the recipe; on CIFAR's
    images a recipe is no shorter than ours of its protocol."""
    found = set()
    for trial in study.trials:
        protocol, epochs = trial.fields["protocol"], int(trial.fields["epochs"])
        of_recipe = full.get(protocol, 0)
        if trial.fields["source"] in DATASETS:
            of_recipe = max(of_recipe, FULL_EPOCHS.get(protocol, 0))
        if epochs < of_recipe:
            found.add((protocol, epochs, of_recipe))
    return [f"{epochs} of {of_recipe}" for _, epochs, of_recipe in sorted(found)]


def pool_of(trial: Trial) -> str:
    """How the training pool falls with the class; what the title and the figure's name say."""
    fields = trial.fields
    profile, largest = fields["imbalance_profile"], fields["images_per_class"]
    words = "natural counts" if profile == "natural" else f"IF {fields['imbalance_factor']}"
    if profile == "step":
        words = f"step {words}"
    if largest != "none" and fields["source"] != "synthetic":
        words += f", largest class {largest}"
    return words


def pools(study: Study) -> str:
    return " / ".join(sorted({pool_of(trial) for trial in study.trials}, key=natural))


def title_of(study: Study, full: Mapping[str, int]) -> str:
    sources = " / ".join(DATASETS.get(s, f"source {s}") for s in values_of(study, "source"))
    title = f"{sources}, {pools(study)}, protocol {joined(study, 'protocol')}"
    short = short_schedules(study, full)
    return f"{title}, short schedule ({', '.join(short)} epochs)" if short else title


def figure_names(studies: Sequence[Study], stem: str) -> list[str]:
    """A file a sweep, named after what it is of; with a part of its id where that is not enough."""
    names = []
    for study in studies:
        pool = pools(study).replace("IF ", "if").replace(", ", "_")
        name = f"{joined(study, 'protocol')}_{joined(study, 'source')}_{pool}"
        names.append(re.sub(r"[^\w.-]+", "-", f"{stem}_{name}"))
    return [
        f"{name}.png" if names.count(name) == 1 else f"{name}_{study.run_ids[0][:6]}.png"
        for name, study in zip(names, studies, strict=True)
    ]


def as_markdown(
    studies: Sequence[Study], settings: Sequence[Setting], figures: Sequence[str], command: str
) -> str:
    parts = [
        "# Results",
        f"{MARK} below from the tracking store; not to be edited. -->\n\n"
        f"Written from the tracking store, every figure as a run recorded it:\n\n"
        f"```sh\n{command}\n```",
    ]
    for study, setting, figure in zip(studies, settings, figures, strict=True):
        title = plain(title_of(study, setting.full_epochs))
        first, *tables = markdown(title, "", sections_of(study, ("test_balanced",)))
        notice = notice_of(study).strip()
        picture = f"![{title}: means with 95 % intervals]({figure})"
        parts += [first, *([notice] if notice else []), setting_in_words(study, setting)]
        parts += [picture, how_to_read(study), *tables]
        if is_published_for(study):
            parts.append(f"### Beside the published figures\n\n{what_differs(study, setting)}")
        parts.append(f"### How it was made\n\n{how_it_was_made(study, setting)}")
    if any(map(is_published_for, studies)):
        parts.append(published_figures())
    return "\n\n".join(parts) + "\n"


def setting_in_words(study: Study, setting: Setting) -> str:
    lines = []
    short = short_schedules(study, setting.full_epochs)
    if short:
        lines.append(
            f"**Short schedule:** {', '.join(short)} epochs of the recipe. These figures say how "
            "the losses compare after so many epochs, not what the recipe reaches."
        )
    lines.append(summary(study))
    lines += [
        f"protocol `{protocol}`: {PROTOCOLS.get(protocol, 'see its fields')}."
        for protocol in values_of(study, "protocol")
    ]
    lines += [f"{SUBSETS.get(rule, rule)}." for rule in values_of(study, "subset_rule")]
    if setting.sizes:
        lines.append(
            f"{setting.sizes['pool']:,} images in the pool, {setting.sizes['train']:,} trained on, "
            f"{setting.sizes['test_balanced']:,} in `test_balanced`."
        )
    not_recipe = ("loss", *KNOBS, *CHANCE, *SPLITS_FOLLOW_FROM)
    names = dict.fromkeys(n for group in study.groups for n in group.settings)
    recipe = [f"{n} {joined(study, n)}" for n in names if n not in not_recipe]
    lines.append(f"Recipe: {plain(', '.join(recipe))}.")
    where = []
    for name in WHERE_TRAINED:
        values = sorted({shortened(name, t.tags[name]) for t in study.trials if name in t.tags})
        where += [f"{name} {' / '.join(values)}"] if values else []
    lines.append(f"Where: {plain(', '.join(where)) or 'not recorded'}.")
    return "\n".join(f"- {line[0].upper()}{line[1:]}" for line in lines)


def how_it_was_made(study: Study, setting: Setting) -> str:
    parts = []
    if setting.grid:
        parts.append(
            f"`{MLFLOW_RUN} -e sweep -P sweep=<file>`, the file being (run "
            f"`{setting.sweep_id}`)\n\n```yaml\n{setting.grid}\n```"
        )
    else:
        parts.append(f"Child runs of run `{setting.sweep_id}`.")
    commands = []
    for group in study.groups:
        fields = dict(group.trials[0].fields)
        folder = " -P data_dir=<images>" if fields.pop("data_dir", "none") != "none" else ""
        try:
            commands.append(repeat_command(make_config(fields)) + folder)
        except ConfigError:  # of another version of this program
            continue
    if commands:
        lines = "\n".join(commands)
        parts.append(f"The first training of each group alone:\n\n```sh\n{lines}\n```")
    return "\n\n".join(parts)


# --- published figures ------------------------------------------------------------------------


def is_published_for(study: Study) -> bool:
    """Whether all of it is of the data that the published figures are of."""
    return all(set(values_of(study, name)) <= set(of) for name, of in APPLIES_TO.items())


def what_differs(study: Study, setting: Setting) -> str:
    """From how the figures under *Published figures* came about."""
    protocols, rules = values_of(study, "protocol"), values_of(study, "subset_rule")
    lines = [f"epochs: {joined(study, 'epochs')} here; theirs are in the table"]
    if setting.sizes:
        sizes = setting.sizes
        lines.append(
            f"images: {sizes['train']:,} of a pool of {sizes['pool']:,} trained on, "
            f"{sizes['test_balanced']:,} tested on; there 10,847 and 10,000"
        )
    if "own" in rules:
        lines.append("subset: drawn by `split_seed`; there that of LDAM's code or another one")
    if "experts" in protocols:
        lines.append("selection: on `val_lt`; there mostly the epoch best on the test images")
    if "literature" in protocols:
        lines.append(
            "selection: none, the last epoch; there mostly the epoch best on the test images"
        )
    lines.append("seeds: a mean and its interval; there one figure, unless the table says else")
    return "\n".join(f"- {line}" for line in lines)


def published_figures() -> str:
    rows = []
    for one in PUBLISHED:
        by_class = " / ".join(f"{value:.1f}" for value in one.by_class) if one.by_class else "-"
        ece = "-" if one.ece is None else f"{one.ece:.2f}"
        source = f"[{one.source}]({one.url})" if one.url else one.source
        text = [one.method, one.paper, source, one.recipe, one.selection]
        rows.append([*text, f"{one.top1:.2f}", by_class, ece])
    header = ("method", "paper", "read in", "recipe", "selection, seeds", "top-1, %")
    table = report.table((*header, "many / medium / few", "ECE, %"), rows, text=5)
    return (
        "## Published figures\n\nCIFAR-100-LT, exponential, imbalance factor 100, ResNet-32, "
        "trained on the whole pool of 10,847 images, top-1 on all 10,000 test images, unless said "
        f"otherwise; as their sources state them. None was measured here.\n\n{table}"
    )
