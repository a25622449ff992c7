"""C++ of this project, compiled for the processor that it runs on by the compiler at hand."""

import atexit
import ctypes
import functools
import os
import shlex
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

VALUES = {torch.bfloat16: "bf16", torch.float32: "float"}  # of tensors, and their names there
COMPILER = "c++"  # unless the environment names another, as CXX
# CXX may bring -ffast-math: PyTorch's own numbers below 1e-38 would become 0 in this process.
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-fast-math", "-fno-trapping-math", "-fopenmp")
HEADERS = Path(__file__).parent
COMPILER_SECONDS = 120  # that it may take
OPENMP = ("libgomp", "libiomp", "libomp")  # its libraries


def compile_ahead(source: Path, dtype: torch.dtype) -> None:
    """Begins what `compiled` waits for, beside whatever this process does until then."""
    with suppress(OSError, RuntimeError):  # which `compiled` raises
        _begun(source, dtype)


@functools.cache
def compiled(source: Path, dtype: torch.dtype) -> ctypes.CDLL:
    """The library that `source` is for tensors of `dtype`; RuntimeError, with the reason, where
    there is none.

    Once a process, which takes seconds.
    """
    begun = _begun(source, dtype)
    before = _openmp_libraries_at_first()
    try:
        _, said = begun.process.communicate(timeout=COMPILER_SECONDS)
        if code := begun.process.returncode:
            lines = said.strip().split("\n")
            reason = next((line for line in lines if "error" in line), lines[-1])
            raise RuntimeError(f"{begun.compiler} failed: {reason or f'code {code}'}")
        library = ctypes.CDLL(str(begun.path))
    finally:
        begun.end()
    if more := sorted(openmp_libraries() - before):
        # They would wait for work on the cores that PyTorch's compute on.
        raise RuntimeError(f"what {begun.compiler} compiles brings threads of its own: {more[0]}")
    return library


class _Compilation(NamedTuple):
    """A compiler at work."""

    compiler: str
    process: subprocess.Popen
    path: Path  # of the library
    folder: tempfile.TemporaryDirectory  # which holds that, and what the compiler needs meanwhile

    def end(self) -> None:
        """At the latest when this process ends: another may not need it after all."""
        self.process.kill()
        self.process.communicate()
        self.folder.cleanup()
        atexit.unregister(self.end)


@functools.cache
def _begun(source: Path, dtype: torch.dtype) -> _Compilation:
    compiler = shlex.split(os.environ.get("CXX", "")) or [COMPILER]
    folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    path = Path(folder.name, f"{source.stem}.so")
    try:
        process = subprocess.Popen(
            [
                *compiler,
                *FLAGS,
                f"-DVALUE={VALUES[dtype]}",
                f"-I{HEADERS}",
                "-shared",
                "-fPIC",
                source,
                "-o",
                path,
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env={**os.environ, "LC_ALL": "C", "TMPDIR": folder.name},  # "error", in English
        )
    except FileNotFoundError:
        folder.cleanup()
        raise RuntimeError(f"no C++ compiler {compiler[0]!r}; CXX names another") from None
    begun = _Compilation(compiler[0], process, path, folder)
    atexit.register(begun.end)
    return begun


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
