"""C++ of this project, compiled for the processor that it runs on by the compiler at hand."""

import ctypes
import functools
import os
import shlex
import subprocess
import tempfile
from pathlib import Path

from torch import Tensor

COMPILER = "c++"  # unless the environment names another, as CXX
# CXX may bring -ffast-math: PyTorch's own numbers below 1e-38 would become 0 in this process.
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-fast-math", "-fno-trapping-math", "-fopenmp")
HEADERS = Path(__file__).parent
COMPILER_SECONDS = 120  # that it may take
OPENMP = ("libgomp", "libiomp", "libomp")  # its libraries


@functools.cache
def compiled(source: Path, *options: str) -> ctypes.CDLL:
    """The library that `source` is; RuntimeError, with the reason, where there is none.

    Once a process, which takes a second or so.
    """
    compiler = shlex.split(os.environ.get("CXX", "")) or [COMPILER]
    before = _openmp_libraries_at_first()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"{source.stem}.so")
        try:
            made = subprocess.run(
                [
                    *compiler,
                    *FLAGS,
                    *options,
                    f"-I{HEADERS}",
                    "-shared",
                    "-fPIC",
                    source,
                    "-o",
                    path,
                ],
                check=False,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                env={**os.environ, "LC_ALL": "C"},  # "error", in English
                timeout=COMPILER_SECONDS,
            )
        except FileNotFoundError:
            raise RuntimeError(f"no C++ compiler {compiler[0]!r}; CXX names another") from None
        if made.returncode != 0:
            said = made.stderr.strip().split("\n")
            reason = next((line for line in said if "error" in line), said[-1])
            raise RuntimeError(f"{compiler[0]} failed: {reason or f'code {made.returncode}'}")
        library = ctypes.CDLL(str(path))
    if more := sorted(openmp_libraries() - before):
        # They would wait for work on the cores that PyTorch's compute on.
        raise RuntimeError(f"what {compiler[0]} compiles brings threads of its own: {more[0]}")
    return library


@functools.cache
def _openmp_libraries_at_first() -> set[str]:
    """Before anything was compiled: what one library has brought, it has not had for the next."""
    return openmp_libraries()


def openmp_libraries() -> set[str]:
    """Those of this process, where Linux says which."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return set()
    files = {line.split(maxsplit=5)[5] for line in lines if "/" in line}
    return {file for file in files if Path(file).name.startswith(OPENMP)}


def addresses(*tensors: Tensor | None) -> list[int | None]:
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]
