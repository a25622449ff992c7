"""Entry point `results`: a page of sweeps, from the store alone; never typed by hand."""

import os
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from shlex import quote

from longtail_experts.config import shorten
from longtail_experts.tracking import results_page, study_report
from longtail_experts.tracking.runs import RunError, launched_run
from longtail_experts.tracking.study import read_study


def run(sweep_ids: Sequence[str], out: Path) -> None:
    """Write the page and, beside it, a figure a sweep; equal stores give equal pages.

    RunError before anything is written: nothing to read, or a place that cannot be written.
    """
    require_usable(out)
    for sweep_id, times in Counter(sweep_ids).items():
        if times > 1:
            raise RunError(f"sweeps: {sweep_id} is given {times} times")
    studies = [read_study(sweep_id, "sweeps") for sweep_id in sweep_ids]
    settings = [results_page.read_setting(study) for study in studies]
    names = results_page.figure_names(studies, out.stem)
    command = f"python -m longtail_experts results --sweeps {','.join(sweep_ids)}"
    page = results_page.as_markdown(
        studies, settings, names, f"{command} --out {quote(as_given(out))}"
    )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(out, error) from None
    with launched_run(f"results {out.name}", {"stage": "results"}):
        try:
            with tempfile.TemporaryDirectory(dir=out.parent, prefix=".results-") as scratch:
                folder = Path(scratch)
                for study, setting, name in zip(studies, settings, names, strict=True):
                    title = results_page.title_of(study, setting.full_epochs)
                    study_report.draw(study, title, folder / name)
                (folder / out.name).write_text(page, encoding="utf-8")
                for name in (*names, out.name):
                    os.replace(folder / name, out.parent / name)
        except OSError as error:
            raise cannot_write(out, error) from None
    print(f"{out}: {len(studies)} sweeps, {sum(len(s.trials) for s in studies)} trainings")


def require_usable(out: Path) -> None:
    if out.suffix != ".md" or out.is_dir():
        raise RunError(f"out={shorten(out)}: give the name of a Markdown file, as docs/results.md")
    try:
        is_ours = not out.exists() or results_page.MARK in out.read_text(errors="replace")
    except OSError as error:
        raise cannot_write(out, error) from None
    if not is_ours:
        raise RunError(f"out={shorten(out)}: is there, and no page of `results`; give another name")


def cannot_write(out: Path, error: OSError) -> RunError:
    return RunError(f"out={shorten(out)}: cannot be written ({error.strerror or error})")


def as_given(out: Path) -> str:
    """No absolute path of this machine goes into the page."""
    return out.name if out.is_absolute() else out.as_posix()
