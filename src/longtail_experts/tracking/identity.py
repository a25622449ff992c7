"""Which source decides an expert's figures."""

import hashlib
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
# Images and splits, all mathematics, and the stages that call it. Not how runs are recorded,
# compared or exported, nor the libraries underneath.
DECIDES_FIGURES = (
    "data/*.py",
    "learning/*.py",
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
