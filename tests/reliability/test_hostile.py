"""Broken and hostile input: one clear line each, nothing executed, nothing written elsewhere.

Each case is (what it is, a function that makes it and opens it, what the line must say). The
functions raise ConfigError, DataError, RunError or CheckpointError; anything else fails.
"""

import contextlib
import hashlib
import io
import os
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import change_json
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import EpsImagePlugin, Image
from reliability.bounded import says_within

from longtail_experts import load_expert_logits
from longtail_experts.config import Config, ConfigError, make_config, parse_recipe
from longtail_experts.data import sources
from longtail_experts.data.sources import DataError, load_images
from longtail_experts.stages.export import dataset_name
from longtail_experts.tracking import experts
from longtail_experts.tracking.checkpoints import CheckpointError, read_file
from longtail_experts.tracking.runs import Run, RunError, open_run

FORESEEN = (ConfigError, DataError, RunError, CheckpointError)
LONG = "x" * 10_000
SHELL = "$(touch pwned); `touch pwned` | touch pwned & ' \" \n touch pwned"


class Touch:
    """Creates a file when it is unpickled."""

    def __reduce__(self):
        return (os.system, ("touch pwned",))


# --- fields of the config -----------------------------------------------------------------------

NOT_A_NUMBER = ["abc", "", "nan", "inf", "-inf", "1e999", "0x10", "1,5", "1 000", LONG, SHELL, "\0"]
NOT_A_COUNT = [*NOT_A_NUMBER, "-1", "1.5", "10000000000", "9" * 5000]
NOT_A_WORD = ["nonsense", "", LONG, SHELL, "../../etc/passwd", "\ud800", "ce\0"]
COUNTS = ("epochs", "batch_size", "validation_every", "checkpoint_every", "split_seed", "seed")
NUMBERS = ("lr", "tau", "imbalance_factor", "momentum", "weight_decay", "lr_decay")
WORDS = ("loss", "source", "imbalance_profile", "shortcut", "device", "precision")
BAD_FIELDS = [
    *((name, value) for name in COUNTS for value in NOT_A_COUNT),
    *((name, value) for name in NUMBERS for value in [*NOT_A_NUMBER, "-1"]),
    *((name, value) for name in WORDS for value in NOT_A_WORD),
    *(("data_dir", value) for value in ("", "a\0b", "\udcff")),
    *(("milestones", v) for v in ("3,2", "0", "-1,4", "a,b", "1,,2", "1.5", LONG, SHELL, "nan")),
    *(("register_as", value) for value in ("a/b", "a:b", "../x", "$(id)", "", LONG, SHELL)),
    *((n, value) for n in ("fast", "fused", "preflight") for value in ("maybe", "2", LONG, SHELL)),
]


@pytest.mark.parametrize(("name", "value"), BAD_FIELDS, ids=lambda v: repr(v)[:24])
def test_a_bad_field_is_named_in_one_line(name, value):
    with pytest.raises(ConfigError) as caught:
        make_config({name: value})
    line = str(caught.value)
    assert line.startswith(f"{name}=")
    assert len(line.splitlines()) == 1
    assert len(line) < 500
    assert line.isprintable()


# --- recipes ------------------------------------------------------------------------------------

LAUGHS = "a: &a [x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}]\n" for i in range(24)
)
MERGED = "a: &a {x: 1}\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} {{<<: [{', '.join([f'*{chr(97 + i)}'] * 9)}]}}\n"
    for i in range(9)
)
BAD_RECIPES = {
    "nothing": ("", "must hold `field: value` lines"),
    "a list": ("- 1\n- 2", "must hold `field: value` lines"),
    "python object": ("lr: !!python/object/apply:os.system ['touch pwned']", "cannot be read"),
    "python name": ("lr: !!python/name:os.system", "cannot be read"),
    "unknown tag": ("lr: !touch pwned", "cannot be read"),
    "billion laughs": (LAUGHS, "must be one value or a flat list"),
    "itself": ("lr: &a [*a]", "must be one value or a flat list"),
    "nested": ("lr: {a: 1}", "must be one value or a flat list"),
    "deep": ("lr: " + "[" * 5000 + "]" * 5000, "cannot be read"),
    "unclosed": ("lr: [1, 2", "cannot be read"),
    "tabs": ("lr:\t\t- 1\n\t- 2", "cannot be read"),
    "two documents": ("lr: 1\n---\nlr: 2", "cannot be read"),
    "unhashable key": ("? [a]\n: 1", "cannot be read"),
    "control characters": ("lr: \x07", "cannot be read"),
    "bad date": ("lr: 2020-99-99", "cannot be read"),
    "number of many parts": (f"lr: {'1:' * 4000}1.5", "lr=1:1:"),
    "merged a billion times": (MERGED, "must be one value or a flat list"),
    "number of many digits": (f"lr: 0x{'f' * 90_000}", "lr="),
    "a million keys": ("\n".join(f"k{i}: 1" for i in range(9000)), "unknown field 'k0'"),
    "long": ("# " + "x" * 200_000, "longer than"),
    "long list": (f"milestones: [{', '.join(map(str, range(1, 3000)))}]", "flat list"),
}


@pytest.mark.parametrize("kind", BAD_RECIPES)
def test_a_bad_recipe_is_one_line(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text, says = BAD_RECIPES[kind]
    line = says_within(lambda: make_config(parse_recipe(text, "config=mine.yaml")), (ConfigError,))
    assert says in line
    assert len(line.splitlines()) == 1
    assert not list(tmp_path.iterdir())


# --- checkpoints --------------------------------------------------------------------------------


def saved(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


GOOD = saved({"model": {"fc.bias": torch.zeros(300)}, "epoch": 1, "step": 9})


@cache
def zip_bomb() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("archive/data.pkl", bytes(200_000_000))
    return buffer.getvalue()


def flip(content: bytes, at: float) -> bytes:
    changed = bytearray(content)
    changed[int(at * (len(changed) - 1))] ^= 0x40
    return bytes(changed)


def said_to_be_compressed(content: bytes) -> bytes:
    """The same zip, in whose directory every part is called compressed."""
    start, *entries = content.split(b"PK\x01\x02")
    method = struct.pack("<H", zipfile.ZIP_DEFLATED)
    deflated = [entry[:6] + method + entry[8:] for entry in entries]
    return b"PK\x01\x02".join([start, *deflated])


def with_pickle(payload: bytes) -> bytes:
    """A torch file whose pickle is another."""
    source, buffer = zipfile.ZipFile(io.BytesIO(GOOD)), io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for entry in source.infolist():
            is_pickle = entry.filename.endswith("data.pkl")
            archive.writestr(entry.filename, payload if is_pickle else source.read(entry))
    return buffer.getvalue()


# 300 float32 in the file, 500 million in its pickle
GOOD_PICKLE_CLAIMS_MORE = with_pickle(
    zipfile.ZipFile(io.BytesIO(GOOD))
    .read("archive/data.pkl")
    .replace(b"M" + struct.pack("<H", 300), b"J" + struct.pack("<i", 500_000_000))
)
BAD_CHECKPOINTS: dict[str, bytes] = {
    "empty": b"",
    "text": b"not a checkpoint",
    "zeros": bytes(4096),
    "bare pickle": pickle.dumps({"model": {}, "epoch": 1, "step": 1}),
    "bare pickled code": pickle.dumps(Touch()),
    "pickled code": saved({"model": {}, "epoch": 1, "step": 1, "more": Touch()}),
    "pickled code inside": with_pickle(pickle.dumps(Touch())),
    "pickle of protocol 0": with_pickle(b"cos\nsystem\n(S'touch pwned'\ntR."),
    "half a pickle": with_pickle(b"\x80\x02}q\x00("),
    "zip bomb": zip_bomb(),
    "said to be compressed": said_to_be_compressed(GOOD),
    "bytearray bomb": with_pickle(b"\x80\x02cbuiltins\nbytearray\nJ\x00\x00\x00\x7f\x85R."),
    "tensor bomb": with_pickle(b"\x80\x02ctorch\nTensor\nJ\x00\x00\x00\x7f\x85R."),
    "storage bomb": with_pickle(b"\x80\x02ctorch\nFloatTensor\nJ\x00\x00\x00\x7f\x85R."),
    "set bomb": with_pickle(b"\x80\x02cbuiltins\nset\n]\x85R."),
    "one value a billion times": saved(
        {"model": {"fc.bias": torch.zeros(1).expand(10**9)}, "epoch": 1, "step": 1}
    ),
    "one loss a billion times": saved(
        {"model": {}, "losses": [torch.zeros(1).expand(10**9)], "epoch": 1, "step": 1}
    ),
    "more values than there are": GOOD_PICKLE_CLAIMS_MORE,
    "zip of nothing": (lambda b: (zipfile.ZipFile(b, "w").close(), b.getvalue())[1])(io.BytesIO()),
    "a list": saved([1, 2, 3]),
    "a number": saved(7),
    "no model": saved({"epoch": 1, "step": 1}),
    "no epoch": saved({"model": {}, "step": 1}),
    "epoch is text": saved({"model": {}, "epoch": "1", "step": 1}),
    "epoch is negative": saved({"model": {}, "epoch": -1, "step": 1}),
    "step is huge": saved({"model": {}, "epoch": 1, "step": 10**30}),
    "step is true": saved({"model": {}, "epoch": 1, "step": True}),
    "step is NaN": saved({"model": {}, "epoch": 1, "step": float("nan")}),
    "model is a list": saved({"model": [], "epoch": 1, "step": 1}),
    "weights are text": saved({"model": {"fc.bias": "x"}, "epoch": 1, "step": 1}),
    "weights are float64": saved(
        {"model": {"fc.bias": torch.zeros(3, dtype=torch.float64)}, "epoch": 1, "step": 1}
    ),
    **{f"cut at {part:.0%}": GOOD[: int(part * len(GOOD))] for part in np.linspace(0.05, 0.95, 10)},
    **{
        f"flipped in tensor data {i}": GOOD[:i] + bytes([GOOD[i] ^ 1]) + GOOD[i + 1 :]
        for i in range(GOOD.index(bytes(1200)), GOOD.index(bytes(1200)) + 1200, 100)
    },
}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", BAD_CHECKPOINTS)
def test_a_bad_checkpoint_is_refused_unexecuted(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "last.pt"
    path.write_bytes(BAD_CHECKPOINTS[kind])
    assert len(says_within(lambda: read_file(path), (CheckpointError,)).splitlines()) <= 1
    assert not (tmp_path / "pwned").exists()


def test_the_good_checkpoint_of_these_cases_is_read(tmp_path):
    (tmp_path / "last.pt").write_bytes(GOOD)
    assert read_file(tmp_path / "last.pt")["step"] == 9


# --- logits, manifests and the config of a run from elsewhere -----------------------------------


def npz_header(shape: str, dtype: str = "<f4") -> bytes:
    """An npz whose `logits` claims a shape that its bytes do not have."""
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    text += b" " * (63 - (len(text) + 10) % 64) + b"\n"
    member = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(64)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in ("logits", "targets", "indices"):
            archive.writestr(f"{name}.npy", member)
    return buffer.getvalue()


def npz(**arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def good_arrays(folder: Path) -> dict[str, np.ndarray]:
    with np.load(folder / "logits/calib.npz") as file:
        return {name: file[name] for name in file.files}


def altered(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], bytes]:
    def make(folder: Path) -> bytes:
        arrays = good_arrays(folder)
        return npz(**{**arrays, name: change(arrays[name])})

    return make


def spoiled(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        array = array.copy()
        array.reshape(-1)[0] = value
        return array

    return change


BAD_LOGITS: dict[str, Callable[[Path], bytes]] = {
    "empty": lambda f: b"",
    "text": lambda f: b"hello",
    "bare npy": lambda f: npz_header("(2,)")[30:],
    "pickled code": lambda f: npz(logits=np.array([Touch()], dtype=object), targets=0, indices=0),
    "huge shape": lambda f: npz_header("(10000000000, 100)"),
    "negative shape": lambda f: npz_header("(-1, 5)"),
    "overflowing shape": lambda f: npz_header("(4611686018427387904, 4611686018427387904)"),
    "object dtype": lambda f: npz_header("(2,)", "|O"),
    "code for a header": lambda f: npz_header("__import__('os').system('touch pwned')"),
    "zip bomb": lambda f: zip_bomb(),
    "said to be compressed": lambda f: said_to_be_compressed(npz(**good_arrays(f))),
    "NaN": altered("logits", spoiled(np.nan)),
    "inf": altered("logits", spoiled(np.inf)),
    "negative target": altered("targets", spoiled(-1)),
    "target too large": altered("targets", spoiled(5)),
    "float64": altered("logits", lambda a: a.astype(np.float64)),
    "int32 targets": altered("targets", lambda a: a.astype(np.int32)),
    "a row short": altered("logits", lambda a: a[:-1]),
    "a class short": altered("logits", lambda a: a[:, :-1]),
    "flat": altered("logits", lambda a: a.reshape(-1)),
    "indices short": altered("indices", lambda a: a[:-1]),
    "no indices": lambda f: npz(**{k: v for k, v in good_arrays(f).items() if k != "indices"}),
    "bit flipped": lambda f: flip((f / "logits/calib.npz").read_bytes(), 0.5),
    "truncated": lambda f: (f / "logits/calib.npz").read_bytes()[:-100],
}


@pytest.mark.parametrize("kind", BAD_LOGITS)
def test_bad_logits_are_refused_even_with_the_right_hash(kind, editable, tmp_path):
    run_id, artifacts = editable
    content = BAD_LOGITS[kind](artifacts)
    (artifacts / "logits/calib.npz").write_bytes(content)
    sha256 = hashlib.sha256(content).hexdigest()
    change_json(
        artifacts / "logits/manifest.json",
        lambda m: m["files"]["calib"].__setitem__("sha256", sha256),
    )
    line = says_within(lambda: load_expert_logits(run_id), (RunError,))
    assert "calib.npz" in line
    assert len(line.splitlines()) == 1
    assert not (tmp_path / "pwned").exists()


BAD_MANIFESTS: dict[str, Callable[[dict], object]] = {
    "a list": lambda m: [],
    "null": lambda m: "null",
    "no temperature": lambda m: m.pop("temperature") and None,
    "temperature is text": lambda m: m.__setitem__("temperature", "hot"),
    "temperature is a list": lambda m: m.__setitem__("temperature", [1]),
    "prior too short": lambda m: m.__setitem__("prior", [1.0]),
    "prior is text": lambda m: m.__setitem__("prior", "uniform"),
    "prior with NaN": lambda m: m["prior"].__setitem__(0, float("nan")),
    "log_offset with inf": lambda m: m["log_offset"].__setitem__(0, float("inf")),
    "a split is missing": lambda m: m["files"].pop("test_lt") and None,
    "rows is text": lambda m: m["files"]["calib"].__setitem__("rows", "many"),
    "rows is negative": lambda m: m["files"]["calib"].__setitem__("rows", -1),
    "rows is another": lambda m: m["files"]["calib"].__setitem__("rows", 10**12),
    "rows is infinite": lambda m: m["files"]["calib"].__setitem__("rows", float("inf")),
    "files is a list": lambda m: m.__setitem__("files", []),
    "hash of another": lambda m: m["files"]["calib"].__setitem__("sha256", "0" * 64),
    "hash is a path": lambda m: m["files"]["calib"].__setitem__("sha256", "../../etc/passwd"),
}


@pytest.mark.parametrize("kind", BAD_MANIFESTS)
def test_a_bad_manifest_is_refused(kind, editable):
    run_id, artifacts = editable
    change_json(artifacts / "logits/manifest.json", BAD_MANIFESTS[kind])
    with pytest.raises(RunError) as caught:
        load_expert_logits(run_id)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a": 1e999}', b"NaN"], ids=repr
)
@pytest.mark.parametrize("name", ["logits/manifest.json", "splits/manifest.json"])
def test_a_manifest_that_is_no_json_is_refused(name, content, editable):
    run_id, artifacts = editable
    (artifacts / name).write_bytes(content)
    with pytest.raises(RunError, match="manifest"):
        load_expert_logits(run_id)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"- 1",
        b"\xff\xfe",
        b"lr: !!python/name:os.system",
        b"lr: [[1]]",
        b"nosuch: 1",
        b"lr: -1",
    ],
    ids=repr,
)
def test_a_config_from_elsewhere_is_refused(content, editable):
    run_id, artifacts = editable
    (artifacts / "config.yaml").write_bytes(content)
    with pytest.raises(RunError, match=r"config\.yaml"):
        experts.recorded_config(Run(run_id))


GOOD_MANIFEST = {
    "source": "cifar100",
    "imbalance_profile": "exp",
    "imbalance_factor": 100.0,
    "images_per_class": None,
}


@pytest.mark.parametrize(
    "changed",
    [
        {"source": "../../etc"},
        {"source": "/etc/passwd"},
        {"source": "a/b"},
        {"source": "a\0b"},
        {"source": ".hidden"},
        {"source": LONG},
        {"source": ["x"]},
        {"source": SHELL},
        {"images_per_class": "../../x"},
        {"imbalance_profile": "natural", "source": ".."},
    ],
    ids=repr,
)
def test_a_manifest_cannot_name_a_folder_elsewhere(changed):
    with pytest.raises(ValueError, match="folder name"):
        dataset_name({**GOOD_MANIFEST, **changed})


@pytest.mark.parametrize(
    "run_id", ["", "../../etc/passwd", "/etc/passwd", LONG, SHELL, "a\0b", "\udcff", "' OR 1=1 --"]
)
def test_a_run_id_that_is_none_is_one_line(run_id, store):
    with pytest.raises(RunError) as caught:
        open_run(run_id)
    assert len(str(caught.value)) < 500


# --- images -------------------------------------------------------------------------------------


def png(size: tuple[int, int] = (32, 32), format_: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (200, 10, 10)).save(buffer, format_)
    return buffer.getvalue()


def huge_png() -> bytes:
    """A header of 60,000 x 60,000 pixels in front of a small image."""
    content = bytearray(png())
    content[16:24] = struct.pack(">II", 60_000, 60_000)
    content[29:33] = struct.pack(">I", zlib.crc32(bytes(content[12:29])))
    return bytes(content)


def png_with_text_bomb() -> bytes:
    """A compressed comment of 200 MB."""
    packed = b"Comment\0\0" + zlib.compress(bytes(200_000_000), level=1)
    chunk = struct.pack(">I", len(packed)) + b"zTXt" + packed
    chunk += struct.pack(">I", zlib.crc32(b"zTXt" + packed))
    content = png()
    return content[:33] + chunk + content[33:]


BAD_IMAGES: dict[str, bytes] = {
    "empty": b"",
    "text": b"<html>not found</html>",
    "truncated": png((64, 64))[:90],
    "huge": huge_png(),
    "flipped": flip(png((64, 64)), 0.1),
    "header alone": png()[:8],
    "pickled code": pickle.dumps(Touch()),
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\nshowpage\n",
    "huge bitmap": b"P6 65000 65000 255 " + bytes(100),
    "negative bitmap": b"P6 -1 32 255 " + bytes(100),
    "huge GIF": b"GIF89a" + struct.pack("<HH", 65_535, 65_535) + bytes(100),
    "huge TIFF": png((32, 32), "TIFF").replace(struct.pack("<I", 32), struct.pack("<I", 10**9)),
    "text that unpacks to much": png_with_text_bomb(),
}


@pytest.fixture
def small_folder(tmp_path) -> Path:
    for half in ("train", "test"):
        for name in ("ant", "bee"):
            (tmp_path / half / name).mkdir(parents=True)
            (tmp_path / half / name / "0.png").write_bytes(png())
    return tmp_path


@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_a_bad_image_is_named(kind, small_folder, monkeypatch):
    monkeypatch.setenv("LONGTAIL_CACHE_DIR", str(small_folder / "cache"))
    bad = small_folder / "train" / "bee" / "1.png"
    bad.write_bytes(BAD_IMAGES[kind])
    line = says_within(lambda: load_images("images", str(small_folder)), (DataError,))
    assert re.search(r"bee.1\.png", line)
    assert len(line.splitlines()) == 1


def test_no_image_is_handed_to_another_program(small_folder, monkeypatch):
    """Pillow gives PostScript, whatever the file is called, to the first `gs` on PATH."""
    programs = small_folder / "bin"
    programs.mkdir()
    (programs / "gs").write_text(f"#!/bin/sh\ntouch {small_folder}/pwned\n")
    (programs / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    monkeypatch.setenv("LONGTAIL_CACHE_DIR", str(small_folder / "cache"))
    bad = small_folder / "train" / "bee" / "1.png"
    bad.write_bytes(BAD_IMAGES["PostScript"])
    with contextlib.suppress(OSError), Image.open(bad) as image:  # what is guarded against
        image.load()
    assert (small_folder / "pwned").exists()
    (small_folder / "pwned").unlink()
    with pytest.raises(DataError):
        load_images("images", str(small_folder))
    assert not (small_folder / "pwned").exists()


def test_pipes_and_devices_in_a_folder_are_not_opened(small_folder, monkeypatch):
    """Opening a named pipe would wait for ever."""
    monkeypatch.setenv("LONGTAIL_CACHE_DIR", str(small_folder / "cache"))
    os.mkfifo(small_folder / "train" / "bee" / "pipe.png")
    (small_folder / "train" / "bee" / "zero.png").symlink_to("/dev/zero")
    assert len(load_images("images", str(small_folder)).train_labels) == 2


def parquet(path: Path, images: list, labels: list, **options) -> None:
    table = pyarrow.table({"img": images, "fine_label": labels})
    pyarrow.parquet.write_table(table, path, **options)


IMAGE = {"bytes": png(), "path": "0.png"}
BAD_PARQUETS: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda p: p.write_bytes(b""), "not a parquet file"),
    "text": (lambda p: p.write_bytes(b"PAR1 hello PAR1"), "not a parquet file"),
    "truncated": (
        lambda p: (parquet(p, [IMAGE], [1]), p.write_bytes(p.read_bytes()[:-20])),
        "not a parquet file",
    ),
    "no img": (
        lambda p: pyarrow.parquet.write_table(pyarrow.table({"fine_label": [1]}), p),
        "not a parquet file",
    ),
    "no label": (
        lambda p: pyarrow.parquet.write_table(pyarrow.table({"img": [IMAGE]}), p),
        "not a parquet file",
    ),
    "label too large": (lambda p: parquet(p, [IMAGE], [100]), "fine_label=100"),
    "negative label": (lambda p: parquet(p, [IMAGE], [-1]), "fine_label=-1"),
    "label is text": (lambda p: parquet(p, [IMAGE], ["ant"]), "fine_label=ant"),
    "label is null": (lambda p: parquet(p, [IMAGE, IMAGE], [1, None]), "fine_label=None"),
    "image is text": (lambda p: parquet(p, ["hello"], [1]), "not a parquet file"),
    "image is null": (lambda p: parquet(p, [IMAGE, None], [1, 2]), "not a parquet file"),
    "bytes are null": (lambda p: parquet(p, [IMAGE, {"bytes": None}], [1, 2]), "no bytes"),
    "bytes are no image": (lambda p: parquet(p, [{"bytes": b"x"}], [1]), "not a readable image"),
    "image of another size": (lambda p: parquet(p, [{"bytes": png((8, 8))}], [1]), "is 8x8"),
    "too many rows": (lambda p: parquet(p, [IMAGE] * 70_000, [1] * 70_000), "70,000 rows"),
    "bomb": (
        lambda p: parquet(
            p,
            [{"bytes": bytes(1_000_000)}] * 20,
            [1] * 20,
            compression="zstd",
            use_dictionary=False,
        ),
        "more than CIFAR-100 can have",
    ),
    "one image of megabytes, 80 times": (
        lambda p: parquet(
            p,
            [{"bytes": png() + bytes(6_000_000)}] * 80,
            [1] * 80,
            compression="zstd",
            dictionary_pagesize_limit=2**30,
            write_batch_size=10,
        ),
        "bytes for one image",
    ),
    "one image of megabytes, as differences": (
        lambda p: parquet(
            p,
            [{"bytes": png() + bytes(1_000_000)}] * 300,
            [1] * 300,
            compression="zstd",
            use_dictionary=False,
            column_encoding={"img.bytes": "DELTA_BYTE_ARRAY"},
        ),
        "not a parquet file",
    ),
    "no rows": (
        lambda p: pyarrow.parquet.write_table(
            pyarrow.table(
                {
                    "img": pyarrow.array([], pyarrow.struct([("bytes", pyarrow.binary())])),
                    "fine_label": pyarrow.array([], pyarrow.int64()),
                }
            ),
            p,
        ),
        "holds no image",
    ),
}


@pytest.mark.parametrize("kind", BAD_PARQUETS)
def test_a_bad_parquet_is_one_line(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("LONGTAIL_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(sources, "MAX_UNPACKED", 10_000_000)
    make, says = BAD_PARQUETS[kind]
    make(tmp_path / "train.parquet")
    parquet(tmp_path / "test.parquet", [IMAGE], [1])
    line = says_within(lambda: load_images("cifar100", str(tmp_path)), (DataError,))
    assert says in line
    assert len(line.splitlines()) == 1


# --- anything at all ----------------------------------------------------------------------------


def complaint(work: Callable[[], object]) -> str:
    """What a ConfigError says; nothing where there is none."""
    try:
        work()
    except ConfigError as error:
        return str(error)
    return ""


@given(name=st.text(max_size=20) | st.sampled_from(list(Config.model_fields)), value=st.text())
def test_any_text_is_a_config_or_one_line(name, value):
    line = complaint(lambda: make_config({name: value}))
    assert len(line.splitlines()) <= 1
    assert not line or line.isprintable()


@given(st.text(max_size=300))
def test_any_yaml_is_a_recipe_or_one_line(text):
    assert len(complaint(lambda: make_config(parse_recipe(text, "config=x"))).splitlines()) <= 1


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=4),
    st.floats(0, 1),
)
def test_a_damaged_checkpoint_is_whole_or_refused(tmp_path, changes, keep):
    """Bytes changed anywhere, or the end cut off: what is read is what was written."""
    content = bytearray(GOOD)
    for at, value in changes:
        content[int(at * (len(content) - 1))] = value
    cut = bytes(content[: int(keep * len(content))]) if keep < 0.9 else bytes(content)
    (tmp_path / "x.pt").write_bytes(cut)
    try:
        read = read_file(tmp_path / "x.pt")
    except CheckpointError:
        return
    assert torch.equal(read["model"]["fc.bias"], torch.zeros(300))
    assert (read["epoch"], read["step"]) == (1, 9)


def test_there_are_enough_of_these(capsys):
    tables = (BAD_FIELDS, BAD_RECIPES, BAD_CHECKPOINTS, BAD_LOGITS, BAD_MANIFESTS)
    number = sum(map(len, (*tables, BAD_IMAGES, BAD_PARQUETS))) + 12 + 7 + 10 + 8
    with capsys.disabled():
        print(f"\n{number} bad inputs", end="")
    assert number >= 200
