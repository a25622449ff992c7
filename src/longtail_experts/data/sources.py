"""Image sources: each becomes uint8 arrays, labels, class names and a fingerprint.

    cifar100    official files (md5-checked by torchvision, or downloaded by it), or parquet
    cifar10     the same of CIFAR-10
    images      a folder train/<class>/*, test/<class>/* of images, resized to 32x32
    synthetic   generated from a seed, for demos and tests; says nothing about real images

Decoded images are cached, keyed by the sha256 of the source files; an entry whose content does
not have the fingerprint it was stored with is rebuilt.
"""

import hashlib
import http.client
import json
import logging
import os
import re
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from longtail_experts.data.addresses import without_passwords
from longtail_experts.data.archives import read_npz

log = logging.getLogger(__name__)

SIZE = 32
MOST_SYNTHETIC = 5_000  # generated images of a class: 1.8 GB in all
MAX_ROWS = 60_000  # either CIFAR has 50,000 + 10,000
MAX_UNPACKED = 2**30  # bytes of a parquet file's columns; CIFAR has 0.2 GB
PARQUET_ROWS = 500  # decoded at a time
MAX_IMAGE_BYTES = 100_000  # of one image of a parquet file; 32x32 pixels raw have 3,072
WIDE_MODES = {"I", "F", "I;16", "I;16B", "I;16L", "I;16N"}  # which Pillow would cut off at 255
MAX_PIXELS = 50_000_000  # of one image of a folder, before it is decoded
# Named, because Pillow goes by the content: it would run Ghostscript for PostScript in a .png.
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}


class Cifar(NamedTuple):
    """What tells CIFAR-10 and CIFAR-100 apart."""

    source: str
    title: str
    num_classes: int
    largest: int  # training images of a class
    folder: str  # of the official files
    label: str  # column of the parquet files


CIFARS = {
    cifar.source: cifar
    for cifar in (
        Cifar("cifar100", "CIFAR-100", 100, 500, "cifar-100-python", "fine_label"),
        Cifar("cifar10", "CIFAR-10", 10, 5000, "cifar-10-batches-py", "label"),
    )
}


# What MLflow and urllib3 say of a connection that fails names its address thrice, then why.
NETWORK_SAYS = re.compile(r"Max retries exceeded.*\[Errno -?\d+\] ([\w ,]+)")


class DataError(ValueError):
    """What is wrong with the images, and where, in one line."""


def first_line(error: Exception) -> str:
    """What an error says, for a message of one line; its type where it says nothing.

    Two lines where the first only leads to the second, as of MLflow's downloads and SQLAlchemy;
    of a connection that fails its reason. Passwords in addresses are left out.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    if reason := NETWORK_SAYS.search(lines[0]):
        return reason[1]
    leads = lines[0].endswith(":") or lines[0].startswith("(raised as")
    return without_passwords(" ".join(lines[: 1 + leads]))


@dataclass(frozen=True)
class ImageData:
    """A whole source in memory. Labels are class indices; images are RGB."""

    train_images: np.ndarray  # uint8 [N, 32, 32, 3]
    train_labels: np.ndarray  # int64 [N]
    test_images: np.ndarray
    test_labels: np.ndarray
    class_names: tuple[str, ...]
    source: str
    fingerprint: str
    index_space: str  # "torchvision", or the fingerprint where the order is the files' own
    largest_class: int  # pool images of the largest class unless the config says otherwise


def load_images(
    source: str,
    data_dir: str | None,
    *,
    seed: int = 0,
    images_per_class: int | None = None,
    download: bool = True,
) -> ImageData:
    """The images of a source; raises DataError before anything is written.

    `seed` and `images_per_class` shape the synthetic source alone; `download` allows CIFAR
    to be fetched into a data_dir that holds none of it.
    """
    if source == "synthetic":
        if (images_per_class or 0) > MOST_SYNTHETIC:
            raise DataError(
                f"images_per_class={images_per_class}: so many of 100 classes are not generated; "
                f"at most {MOST_SYNTHETIC:,}"
            )
        return synthetic_images(seed, images_per_class or CIFARS["cifar100"].largest)
    if not data_dir:
        raise DataError(f"data_dir={data_dir or 'none'}: source={source} needs a folder")
    try:
        if source == "images":
            return folder_images(Path(data_dir))
        return cifar_images(CIFARS[source], Path(data_dir), download)
    except OSError as error:  # a folder that may not be read, a name too long
        raise DataError(f"data_dir={data_dir[:200]}: {error.strerror or error}") from None


# --- CIFAR ------------------------------------------------------------------------------------


def cifar_images(cifar: Cifar, folder: Path, download: bool = True) -> ImageData:
    if official_files_present(cifar, folder):
        return _cifar_official(cifar, folder, download)
    if parquet_files(folder):
        return _cifar_parquet(cifar, folder)
    if not download:
        raise DataError(f"data_dir={folder}: {_what_it_looks_like(cifar)}")
    return _cifar_official(cifar, folder, download)


def _what_it_looks_like(cifar: Cifar) -> str:
    return (
        f"no {cifar.title} there; expected {cifar.folder}/ (or its .tar.gz) or train*.parquet and "
        f"test*.parquet with columns img and {cifar.label}"
    )


def official_files_present(cifar: Cifar, folder: Path) -> bool:
    # torchvision's archive of CIFAR-10 is cifar-10-python.tar.gz
    archive = f"{cifar.folder.replace('-batches-py', '-python')}.tar.gz"
    return any((folder / name).exists() for name in (cifar.folder, archive))


def cifar100_on_disk(folder: Path) -> bool:
    return official_files_present(CIFARS["cifar100"], folder) or bool(parquet_files(folder))


def cifar100_can_be_downloaded(seconds: float = 5.0) -> bool:
    """Whether torchvision's download address answers within `seconds` in all."""
    if os.environ.get("LONGTAIL_OFFLINE") == "1":
        return False
    from torchvision.datasets import CIFAR100  # takes seconds, which are not the network's

    reached = threading.Event()

    def probe() -> None:
        try:
            request = urllib.request.Request(CIFAR100.url, method="HEAD")
            with urllib.request.urlopen(request, timeout=seconds) as answer:
                if answer.status == 200:
                    reached.set()
        except (OSError, ValueError, http.client.HTTPException):  # the last: an answer of no server
            pass

    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(seconds)
    return reached.is_set()


def _cifar_official(cifar: Cifar, folder: Path, download: bool) -> ImageData:
    from torchvision.datasets import CIFAR10, CIFAR100
    from torchvision.datasets.utils import check_integrity

    dataset = {"cifar10": CIFAR10, "cifar100": CIFAR100}[cifar.source]

    def both(fetch: bool) -> list:  # torchvision's `download` also unpacks an archive that it has
        return [dataset(folder, train, download=fetch) for train in (True, False)]

    archive = folder / dataset.filename
    not_there = [place for place in (folder, *folder.parents) if not place.exists()]
    if folder.exists() and not folder.is_dir():
        raise DataError(f"data_dir={folder}: is a file: {_what_it_looks_like(cifar)}")
    try:
        try:
            halves = both(fetch=False)
        except RuntimeError:  # not there, or not of the right md5
            from longtail_experts.data.locks import in_turn  # filelock may be missing elsewhere

            waiting = f"another process fetches {cifar.title} into {folder}: waiting for its end"
            with in_turn(f"data {folder.absolute()}", waiting):
                if check_integrity(archive, dataset.tgz_md5):
                    halves = both(fetch=True)
                elif download and not official_files_present(cifar, folder):
                    log.warning("downloading %s into %s (170 MB)", cifar.title, folder)
                    halves = both(fetch=True)
                else:  # or another process has brought them meanwhile
                    halves = both(fetch=False)
    except (OSError, RuntimeError, EOFError) as error:  # md5 mismatch, no network, bad archive
        with suppress(OSError):  # a name mistyped leaves no empty folder behind
            for made in not_there:
                made.rmdir()
        says = first_line(error).replace(" You can use download=True to download it", "")
        remedy = ""
        if official_files_present(cifar, folder):
            remedy = "what an interrupted download has left there is to be deleted first; "
        raise DataError(
            f"data_dir={folder}: {cifar.title} is missing, damaged or cannot be downloaded "
            f"({says}); {remedy}{_what_it_looks_like(cifar)}"
        ) from None
    train, test = halves
    return _image_data(
        train.data,
        train.targets,
        test.data,
        test.targets,
        tuple(train.classes),
        source=cifar.source,
        index_space="torchvision",
        largest_class=cifar.largest,
    )


def parquet_files(folder: Path) -> list[Path]:
    """train*.parquet and test*.parquet anywhere below the folder."""
    found = sorted(folder.rglob("*.parquet")) if folder.is_dir() else []
    return [p for p in found if p.name.startswith(("train", "test")) and p.is_file()]


def _cifar_parquet(cifar: Cifar, folder: Path) -> ImageData:
    files = parquet_files(folder)
    by_name: dict[str, Path] = {}
    for path in files:  # a copy in a folder further down would be read as more images
        if (other := by_name.setdefault(path.name, path)) != path:
            raise DataError(f"data_dir={folder}: {other} and {path} have one name: keep one")
    halves = {
        half: [path for path in files if path.name.startswith(half)] for half in ("train", "test")
    }
    for half, paths in halves.items():
        if not paths:
            raise DataError(f"data_dir={folder}: no {half}*.parquet beside {files[0].name}")

    def decode() -> ImageData:
        (train_images, train_labels, names), (test_images, test_labels, _) = (
            _read_parquet(cifar, paths) for paths in halves.values()
        )
        counts = np.bincount(train_labels)
        if counts.max() > cifar.largest:
            c = int(counts.argmax())
            raise DataError(
                f"data_dir={folder}: class {c} ({names[c]}) has {counts[c]:,} training images, of "
                f"{cifar.title}'s {cifar.largest:,}: files that hold the same are read as more; "
                "keep one of each"
            )
        return _image_data(
            train_images,
            train_labels,
            test_images,
            test_labels,
            names,
            source=cifar.source,
            index_space=None,
            largest_class=cifar.largest,
        )

    return _cached(f"{cifar.source}-{_sha256_of_files(files, folder)}", decode)


def _read_parquet(
    cifar: Cifar, paths: list[Path]
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    import pyarrow
    import pyarrow.parquet

    images, labels, names = [], [], None
    for path in paths:
        try:
            # As a dictionary, a value that a few bytes repeat a thousand times is held once.
            with pyarrow.parquet.ParquetFile(path, read_dictionary=["img.bytes"]) as file:
                about = file.metadata
                unpacked = sum(
                    about.row_group(i).total_byte_size for i in range(about.num_row_groups)
                )
                if len(labels) + about.num_rows > MAX_ROWS or unpacked > MAX_UNPACKED:
                    raise DataError(
                        f"{path}: {about.num_rows:,} rows of {unpacked:,} bytes are more than "
                        f"{cifar.title} can have"
                    )
                names = names or _names_in_schema(cifar, file.schema_arrow.metadata)
                rows = _rows_of(cifar, file, path)
                for data, label in _progress(rows, f"decoding {path.name}", about.num_rows):
                    images.append(data)
                    labels.append(label)
        except (pyarrow.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(
                f"{path}: not a parquet file of {cifar.title} ({first_line(error)})"
            ) from None
    names = names or tuple(f"class {c}" for c in range(cifar.num_classes))
    if not images:
        raise DataError(f"{paths[0]}: holds no image")
    return np.stack(images), np.array(labels, dtype=np.int64), names


def _rows_of(cifar: Cifar, file: Any, path: Path) -> Iterator[tuple[np.ndarray, int]]:
    """(uint8 [32, 32, 3], label) of every row, each checked before it is decoded."""
    row = 0
    for batch in file.iter_batches(PARQUET_ROWS, columns=["img", cifar.label]):
        for cell, label in zip(batch["img"], batch[cifar.label].to_pylist(), strict=True):
            if type(label) is not int or not 0 <= label < cifar.num_classes:
                raise DataError(
                    f"{path}: row {row}: {cifar.label}={label} is not in 0..{cifar.num_classes - 1}"
                )
            data = cell.as_py()["bytes"]
            if not isinstance(data, bytes):
                raise DataError(f"{path}: row {row}: img.bytes holds no bytes")
            if len(data) > MAX_IMAGE_BYTES:
                raise DataError(f"{path}: row {row}: {len(data):,} bytes for one image")
            yield _decode(BytesIO(data), f"{path}: row {row}", exactly=SIZE), label
            row += 1


def _names_in_schema(cifar: Cifar, metadata: dict[bytes, bytes] | None) -> tuple[str, ...] | None:
    try:
        info = json.loads((metadata or {})[b"huggingface"])
        names = info["info"]["features"][cifar.label]["names"]
        return tuple(map(str, names)) if len(names) == cifar.num_classes else None
    except (KeyError, TypeError, ValueError):
        return None


# --- a folder of images -----------------------------------------------------------------------


def _shown(folder: Path) -> Iterator[Path]:
    """What it holds, but for what systems and editors hide there."""
    return (path for path in folder.iterdir() if not path.name.startswith("."))


def folder_images(folder: Path) -> ImageData:
    """train/<class>/* and test/<class>/*, classes in alphabetical order of their folders."""
    classes = {
        half: sorted(p.name for p in _shown(folder / half) if p.is_dir())
        if (folder / half).is_dir()
        else []
        for half in ("train", "test")
    }
    if len(classes["train"]) < 2:
        raise DataError(
            f"data_dir={folder}: no train/<class>/ folders of at least two classes in "
            f"{folder.absolute()}"
        )
    if classes["train"] != classes["test"]:
        different = sorted(set(classes["train"]) ^ set(classes["test"]))
        raise DataError(
            f"data_dir={folder}: train/ and test/ must hold the same class folders; "
            f"only in one of them: {', '.join(different[:5])}"
        )
    names = classes["train"]
    files: dict[str, list[tuple[Path, int]]] = {"train": [], "test": []}
    left_out = []
    for half, found in files.items():
        for c, name in enumerate(names):
            for path in sorted(_shown(folder / half / name)):
                if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file():
                    found.append((path, c))
                elif path.exists():
                    left_out.append(path)
                else:
                    where = path.relative_to(folder).as_posix()
                    raise DataError(f"data_dir={folder}: {where}: a link to nothing")
    if left_out:
        log.warning(
            "data_dir=%s: left out %d entries of class folders that are no image files by their "
            "suffix, the first %r",
            folder,
            len(left_out),
            left_out[0].relative_to(folder).as_posix(),
        )
    for half, found in files.items():
        for c, name in enumerate(names):
            if not any(label == c for _, label in found):
                raise DataError(f"data_dir={folder}: {half}/{name} holds no image")

    def decode() -> ImageData:
        arrays = {}
        for half, found in files.items():
            arrays[half] = np.stack(
                [
                    _decode(path, str(path))
                    for path, _ in _progress(found, f"decoding {half}/", len(found))
                ]
            )
        labels = {half: [label for _, label in found] for half, found in files.items()}
        return _image_data(
            arrays["train"],
            labels["train"],
            arrays["test"],
            labels["test"],
            tuple(names),
            source="images",
            index_space=None,
            largest_class=int(np.bincount(labels["train"]).max()),
        )

    in_order = [path for found in files.values() for path, _ in found]
    return _cached(_sha256_of_files(in_order, folder), decode)


def _decode(file: BytesIO | Path, where: str, exactly: int | None = None) -> np.ndarray:
    """uint8 [32, 32, 3] of an image file; resized unless it must have one size exactly."""
    from PIL import Image

    try:
        with Image.open(file, formats=IMAGE_FORMATS) as image:
            width, height = image.size
            if exactly and (width, height) != (exactly, exactly):
                raise DataError(f"{where}: image is {width}x{height}, not {exactly}x{exactly}")
            if width * height > MAX_PIXELS:
                raise DataError(f"{where}: image of {width}x{height} is too large")
            if image.mode in WIDE_MODES:
                raise DataError(f"{where}: image of mode {image.mode}; give 8 bits a channel")
            image = image.convert("RGB")
            if image.size != (SIZE, SIZE):
                image = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
            return np.asarray(image)
    except DataError:
        raise
    except (OSError, SyntaxError, ValueError, MemoryError, Image.DecompressionBombError) as error:
        raise DataError(f"{where}: not a readable image ({type(error).__name__})") from None


# --- synthetic images -------------------------------------------------------------------------


def synthetic_images(seed: int, images_per_class: int, num_classes: int = 100) -> ImageData:
    """Generated images: images_per_class to train, a fifth of that to test, of each class.

    A class is a coarse pattern shared by five classes plus a fine one of its own. Each image is
    shifted, dimmed, mixed with the fine pattern of another class and covered with noise, and
    the fine pattern is fainter in some classes than in others (not by their frequency), so that
    a network learns the coarse groups first, the fine ones gradually, and classes with few
    examples worst. Integer arithmetic on a frozen random stream: the same bytes everywhere.
    """
    random = np.random.RandomState(seed)
    coarse = _smooth_patterns(random, (num_classes + 4) // 5)
    fine = _smooth_patterns(random, num_classes)
    strength = random.permutation(num_classes) * 24 // num_classes + 24  # of 64: 24..47
    num_test = max(2, images_per_class // 5)
    halves = {"train": ([], []), "test": ([], [])}
    for c in range(num_classes):
        n = images_per_class + num_test
        other = fine[random.randint(0, num_classes, n)].astype(np.int32)
        mixed = 40 * coarse[c // 5].astype(np.int32) + strength[c] * fine[c] + 12 * other
        dim = random.randint(40, 65, (n, 1, 1, 1))
        shift = random.randint(-3, 4, (n, 2))
        rows = (np.arange(SIZE) + shift[:, :1]) % SIZE
        columns = (np.arange(SIZE) + shift[:, 1:]) % SIZE
        moved = mixed[np.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]
        noise = random.randint(-40, 41, moved.shape)
        pixels = np.clip(128 + moved * dim // 4096 + noise, 0, 255).astype(np.uint8)
        for half, part in (
            ("train", pixels[:images_per_class]),
            ("test", pixels[images_per_class:]),
        ):
            halves[half][0].append(part)
            halves[half][1].append(np.full(len(part), c))
    (train_images, train_labels), (test_images, test_labels) = (
        (np.concatenate(images), np.concatenate(labels)) for images, labels in halves.values()
    )
    return _image_data(
        train_images,
        train_labels,
        test_images,
        test_labels,
        tuple(f"synthetic {c}" for c in range(num_classes)),
        source="synthetic",
        index_space=None,
        largest_class=images_per_class,
    )


def _smooth_patterns(random: np.random.RandomState, num: int) -> np.ndarray:
    """int16 [num, 32, 32, 3] in about -100..100: 4x4 random colours, bilinearly enlarged."""
    grid = random.randint(-100, 101, (num, 4, 4, 3)).astype(np.int32)
    position = np.arange(SIZE)
    cell, part = position // 8, position % 8
    across = (
        grid[:, cell] * (8 - part)[:, None, None] + grid[:, (cell + 1) % 4] * part[:, None, None]
    )
    both = across[:, :, cell] * (8 - part)[:, None] + across[:, :, (cell + 1) % 4] * part[:, None]
    return (both // 64).astype(np.int16)


# --- shared -----------------------------------------------------------------------------------


def _image_data(
    train_images, train_labels, test_images, test_labels, class_names, *, index_space, **fields
) -> ImageData:
    arrays = (
        np.ascontiguousarray(train_images, dtype=np.uint8),
        np.asarray(train_labels, dtype=np.int64),
        np.ascontiguousarray(test_images, dtype=np.uint8),
        np.asarray(test_labels, dtype=np.int64),
    )
    fingerprint = _fingerprint(arrays, class_names)
    return ImageData(
        *arrays,
        class_names=tuple(class_names),
        fingerprint=fingerprint,
        index_space=index_space or fingerprint,
        **fields,
    )


def _fingerprint(arrays: Iterable[np.ndarray], class_names: Iterable[str]) -> str:
    """sha256 over pixels, labels and class names, in order."""
    digest = hashlib.sha256(json.dumps(list(class_names)).encode())
    for array in arrays:
        digest.update(f"{array.shape}{array.dtype}".encode())
        digest.update(array.data)
    return digest.hexdigest()


def _sha256_of_files(paths: list[Path], folder: Path) -> str:
    """Over the names below `folder`, which say what is train and what is test, and the contents."""
    digest = hashlib.sha256()
    try:
        for path in paths:
            name = str(path.relative_to(folder)).encode(errors="surrogateescape")
            digest.update(len(name).to_bytes(4, "big") + name)
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    return digest.hexdigest()


OLD = 24 * 3600  # seconds
ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")


def _cached(key: str, decode: Callable[[], ImageData]) -> ImageData:
    folder = Path(os.environ.get("LONGTAIL_CACHE_DIR") or ".cache")
    entry = folder / f"{key}.npz"
    images = _read_entry(entry)
    if images is None:
        images = decode()
        try:
            _write_entry(entry, images)
        except OSError as error:
            log.warning("decoded images are not cached in %s: %s", folder, error)
    return images


def _read_entry(entry: Path) -> ImageData | None:
    if not os.path.isfile(entry):  # nor where the folder may not be looked into
        return None
    try:
        stored = read_npz(entry, (*ARRAYS, "meta"))
        arrays = tuple(stored[name] for name in ARRAYS)
        meta = json.loads(str(stored["meta"]))
        if _fingerprint(arrays, meta["class_names"]) == meta["fingerprint"]:
            meta["class_names"] = tuple(meta["class_names"])
            return ImageData(*arrays, **meta)
    except Exception as error:  # whatever a damaged zip, array header or JSON can raise
        log.debug("%s: %s", entry, error)
    log.warning("%s is damaged and will be rebuilt", entry)
    return None


def _write_entry(entry: Path, images: ImageData) -> None:
    meta = {k: v for k, v in vars(images).items() if k not in ARRAYS}
    entry.parent.mkdir(parents=True, exist_ok=True)
    for left in entry.parent.glob(f"{entry.name}.*.tmp.npz"):  # by a process that was killed
        with suppress(FileNotFoundError):  # another process removes it too
            if left.stat().st_mtime < time.time() - OLD:
                left.unlink()
    scratch = entry.with_name(f"{entry.name}.{os.getpid()}.tmp.npz")
    try:
        arrays = {name: getattr(images, name) for name in ARRAYS}
        np.savez(scratch, meta=np.array(json.dumps(meta)), **arrays)
        os.replace(scratch, entry)
    finally:
        scratch.unlink(missing_ok=True)


def _progress(items: Iterable, what: str, total: int) -> Iterable:
    try:
        from tqdm import tqdm
    except ImportError:  # where only torch and its like are installed
        return items
    return tqdm(
        items,
        total=total,
        desc=what,
        unit="image",
        leave=False,
        mininterval=0.5 if sys.stderr.isatty() else 30,
        disable=total < 2000,
    )
