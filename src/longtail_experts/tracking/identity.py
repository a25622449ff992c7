"""Which source decides an expert's figures, and which processor computes them."""

import hashlib
import os
import platform
import subprocess
from functools import cache
from pathlib import Path

import torch

PACKAGE = Path(__file__).resolve().parents[1]
# Images and splits, all mathematics, and the stages that call it. Not how runs are recorded,
# compared or exported, nor the libraries underneath.
DECIDES_FIGURES = (
    "data/*.py",
    "learning/*.py",
    "learning/*.cpp",
    "learning/*.h",
    "stages/inputs.py",
    "stages/train.py",
    "stages/calibrate.py",
)


@cache
def code_sha256() -> str:
    """Of the text of those files, whatever the commit: one that changes a document, a figure or
    the command line leaves it as it was."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in DECIDES_FIGURES for path in PACKAGE.glob(pattern)}):
        text = path.read_text(encoding="utf-8")  # with any line ends
        digest.update(f"{path.relative_to(PACKAGE).as_posix()} {len(text)}\n{text}".encode())
    return digest.hexdigest()


@cache
def git_tags() -> dict[str, str]:
    """Commit of the source and whether it was changed since, when the process first asks: what is
    committed while it trains is not what it imported.

    Nothing outside a repository, and nothing of one that merely surrounds it, as that of a virtual
    environment's project.
    """
    elsewhere = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")  # set where a hook runs this

    def git(*arguments: str) -> str:
        answer = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
            env={name: value for name, value in os.environ.items() if name not in elsewhere},
        )
        return answer.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)
        commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain")
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"git.commit": commit, "git.dirty": str(bool(changes)).lower()}


def shortened(tag: str, value: str) -> str:
    """Of a tag's commits and hashes (several, where a run was resumed by several) the first
    characters; other values as they are."""
    is_hash = tag.endswith(("git.commit", "code_sha256"))
    return ", ".join(one[:12] for one in value.split(", ")) if is_hash else value


def processor(device: str) -> str:
    """Its name, as the driver of the GPU or the system has it."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:  # not Linux
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(filter(None, named), platform.processor() or platform.machine())
