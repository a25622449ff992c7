"""Which source decides an expert's figures, and which processor computes them."""

import hashlib
import platform
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
