"""npz files that someone else may have written: sizes are checked before memory is taken."""

import math
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

HEADER_BYTES = 100_000  # what numpy accepts of an array's header is far less


def require_honest_zip(archive: zipfile.ZipFile, path: Path) -> None:
    """ValueError where a part is compressed, which torch and numpy never do here, where the parts
    claim more bytes than the file has, or where a checksum does not fit."""
    if packed := [e.filename for e in archive.infolist() if e.compress_type != zipfile.ZIP_STORED]:
        raise ValueError(f"{packed[0]} is compressed")
    unpacked, size = sum(e.file_size for e in archive.infolist()), path.stat().st_size
    if unpacked > size:
        raise ValueError(f"{unpacked:,} bytes in a file of {size:,}")
    if damaged := archive.testzip():
        raise ValueError(f"checksum of {damaged}")


def read_npz(path: Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    """The arrays `names` of an uncompressed npz without pickles.

    Raises ValueError, KeyError, OSError, EOFError or zipfile.BadZipFile where the file is not
    one, where an array is missing, or where its header does not fit its bytes.
    """
    arrays = {}
    with zipfile.ZipFile(path) as archive:
        require_honest_zip(archive, path)
        for name in names:
            entry = archive.getinfo(f"{name}.npy")
            with archive.open(entry) as file:
                version = np.lib.format.read_magic(file)
                read_header = {
                    (1, 0): np.lib.format.read_array_header_1_0,
                    (2, 0): np.lib.format.read_array_header_2_0,
                }[version]
                shape, _, dtype = read_header(file, max_header_size=HEADER_BYTES)
                if dtype.hasobject:
                    raise ValueError(f"{name} holds pickled objects")
                needed = math.prod(shape) * dtype.itemsize
                if needed != entry.file_size - file.tell():
                    raise ValueError(f"{name}: shape {shape} does not fit its bytes")
            with archive.open(entry) as file:
                arrays[name] = np.lib.format.read_array(file, allow_pickle=False)
    return arrays
