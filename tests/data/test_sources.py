import hashlib
import http.client
import io
import json
import os
import pickle
import tarfile
import threading
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image
from torchvision.datasets import CIFAR100

from longtail_experts.data import locks, sources
from longtail_experts.data.sources import (
    DataError,
    ImageData,
    cifar100_can_be_downloaded,
    cifar100_on_disk,
    folder_images,
    load_images,
    synthetic_images,
)

ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")
NAMES = [f"thing {c}" for c in range(100)]
random = np.random.RandomState(0)
TRAIN = random.randint(0, 256, (6, 32, 32, 3), dtype=np.uint8)
TEST = random.randint(0, 256, (4, 32, 32, 3), dtype=np.uint8)
# Of synthetic_images(3, 4, num_classes=7): sha256 of the pixels, and the fingerprint.
SYNTHETIC_PIXELS = "37fc9ae5d68d00e1196170654d069b366bb8b07c0ed027e18b2ee66400fc7045"
SYNTHETIC_FINGERPRINT = "35f59f0b532e4ba244354ae729c130782c5d2bc387fd69d01e9fbff51921e30d"
TRAIN_LABELS, TEST_LABELS = [7, 0, 99, 7, 3, 0], [99, 0, 3, 7]


@pytest.fixture(autouse=True)
def cache_dir(tmp_path, monkeypatch) -> Path:
    """The cache is a fresh folder, and nothing is reached over the network."""

    def unreachable(*args, **kwargs):
        raise urllib.error.URLError("no network in tests")

    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    monkeypatch.setenv("LONGTAIL_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def data_dir(tmp_path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    return folder


def assert_same(a: ImageData, b: ImageData) -> None:
    for name in ARRAYS:
        assert np.array_equal(getattr(a, name), getattr(b, name))
        assert getattr(a, name).dtype == getattr(b, name).dtype
    rest = [{k: v for k, v in vars(x).items() if k not in ARRAYS} for x in (a, b)]
    assert rest[0] == rest[1]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# --- synthetic --------------------------------------------------------------------------------


def test_synthetic_images_are_pinned():
    images = synthetic_images(seed=3, images_per_class=4, num_classes=7)
    pixels = hashlib.sha256(images.train_images.tobytes() + images.test_images.tobytes())
    assert pixels.hexdigest() == SYNTHETIC_PIXELS
    assert images.fingerprint == SYNTHETIC_FINGERPRINT


def test_synthetic_shapes_and_labels():
    images = load_images("synthetic", None, seed=0, images_per_class=10)
    assert images.train_images.shape == (1000, 32, 32, 3)
    assert images.test_images.shape == (200, 32, 32, 3)
    assert images.train_images.dtype == images.test_images.dtype == np.uint8
    assert np.bincount(images.train_labels).tolist() == [10] * 100
    assert np.bincount(images.test_labels).tolist() == [2] * 100
    assert images.train_labels.dtype == np.int64
    assert len(set(images.class_names)) == 100
    assert (images.source, images.largest_class) == ("synthetic", 10)
    assert images.index_space == images.fingerprint


def test_more_than_memory_holds_is_not_generated():
    with pytest.raises(DataError, match=r"^images_per_class=5001: .* at most 5,000$"):
        load_images("synthetic", None, images_per_class=5001)


def test_synthetic_is_decided_by_the_seed():
    first, again, other = (synthetic_images(seed, 3, num_classes=5) for seed in (1, 1, 2))
    assert_same(first, again)
    assert other.fingerprint != first.fingerprint


def test_synthetic_classes_can_be_told_apart():
    """The nearest class mean, at the best of the 49 shifts, is right far above chance (0.05)."""
    images = synthetic_images(0, 30, num_classes=20)
    means = np.stack([images.train_images[images.train_labels == c].mean(0) for c in range(20)])
    means = (means - means.mean((1, 2, 3), keepdims=True)).reshape(20, -1)
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    test = images.test_images - images.test_images.mean((1, 2, 3), keepdims=True)
    shifts = [(y, x) for y in range(-3, 4) for x in range(-3, 4)]
    scores = [np.roll(test, shift, (1, 2)).reshape(len(test), -1) @ means.T for shift in shifts]
    assert (np.max(scores, axis=0).argmax(1) == images.test_labels).mean() > 0.3


# --- parquet ----------------------------------------------------------------------------------


def encoded(image: np.ndarray, file_format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, file_format, lossless=True)
    return buffer.getvalue()


IMG = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write_parquet(path: Path, cells: list[bytes], labels: list, names: list | None = NAMES):
    img = pa.array([{"bytes": data, "path": f"{i}.png"} for i, data in enumerate(cells)], IMG)
    coarse = [0] * len(cells)
    table = pa.table({"img": img, "fine_label": labels, "coarse_label": coarse})
    if names is not None:
        info = {"info": {"features": {"fine_label": {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    pyarrow.parquet.write_table(table, path)


@pytest.fixture
def parquet_dir(data_dir) -> Path:
    write_parquet(data_dir / "train.parquet", [encoded(x) for x in TRAIN], TRAIN_LABELS)
    write_parquet(data_dir / "test.parquet", [encoded(x) for x in TEST], TEST_LABELS)
    return data_dir


def load(folder: Path) -> ImageData:
    return load_images("cifar100", str(folder), download=False)


def assert_is_the_content(images: ImageData) -> None:
    assert np.array_equal(images.train_images, TRAIN)
    assert np.array_equal(images.test_images, TEST)
    assert images.train_labels.tolist() == TRAIN_LABELS
    assert images.test_labels.tolist() == TEST_LABELS
    assert images.class_names == tuple(NAMES)


def test_parquet_round_trip(parquet_dir):
    before = contents(parquet_dir)
    images = load(parquet_dir)
    assert_is_the_content(images)
    assert images.train_images.dtype == np.uint8
    assert images.train_labels.dtype == np.int64
    assert (images.source, images.largest_class) == ("cifar100", 500)
    assert images.index_space == images.fingerprint
    assert contents(parquet_dir) == before


def test_lossless_webp_is_the_same_source_as_png(parquet_dir, tmp_path):
    other = tmp_path / "webp"
    other.mkdir()
    for half, pixels, labels in (("train", TRAIN, TRAIN_LABELS), ("test", TEST, TEST_LABELS)):
        write_parquet(other / f"{half}.parquet", [encoded(x, "WEBP") for x in pixels], labels)
    assert_same(load(other), load(parquet_dir))


def test_files_of_a_half_are_joined_in_order_of_their_names(data_dir):
    below = data_dir / "default" / "data"
    below.mkdir(parents=True)
    for part in (1, 0):
        rows = slice(3 * part, 3 * part + 3)
        write_parquet(
            below / f"train-0000{part}-of-00002.parquet",
            [encoded(x) for x in TRAIN[rows]],
            TRAIN_LABELS[rows],
        )
    write_parquet(data_dir / "test.parquet", [encoded(x) for x in TEST], TEST_LABELS)
    assert_is_the_content(load(data_dir))


@pytest.mark.parametrize("change", ["pixel", "label", "name", "order"])
def test_fingerprint_notices_a_change(parquet_dir, change):
    before = load(parquet_dir).fingerprint
    pixels, labels, names = TRAIN.copy(), list(TRAIN_LABELS), list(NAMES)
    if change == "pixel":
        pixels[5, 31, 31, 2] ^= 1
    elif change == "label":
        labels[5] = 1
    elif change == "name":
        names[50] = "thing"
    else:
        pixels, labels = pixels[::-1], labels[::-1]
    write_parquet(parquet_dir / "train.parquet", [encoded(x) for x in pixels], labels, names)
    assert load(parquet_dir).fingerprint != before


@pytest.mark.parametrize("names", [None, NAMES[:99], [*NAMES, "one more"]])
def test_classes_without_proper_names_are_numbered(parquet_dir, names):
    cells = [encoded(x) for x in TRAIN]
    write_parquet(parquet_dir / "train.parquet", cells, TRAIN_LABELS, names)
    assert load(parquet_dir).class_names[:2] == ("class 0", "class 1")
    assert len(load(parquet_dir).class_names) == 100


@pytest.mark.parametrize("label", [100, -1, None])
def test_bad_label_names_file_row_and_label(parquet_dir, label):
    labels = [0, 1, 2, label, 4, 5]
    write_parquet(parquet_dir / "train.parquet", [encoded(x) for x in TRAIN], labels)
    with pytest.raises(DataError, match=rf"train\.parquet: row 3: fine_label={label} is not in"):
        load(parquet_dir)


def test_fractional_labels_are_refused(parquet_dir):
    labels = [0.0, 1.0, 2.0, 2.5, 4.0, 5.0]
    write_parquet(parquet_dir / "train.parquet", [encoded(x) for x in TRAIN], labels)
    with pytest.raises(DataError, match=r"train\.parquet: row 0: fine_label=0\.0 is not in 0"):
        load(parquet_dir)


@pytest.mark.parametrize(
    ("cell", "says"),
    [
        (encoded(TRAIN[0][:31]), "image is 32x31, not 32x32"),
        (encoded(np.zeros((64, 64, 3), np.uint8)), "image is 64x64, not 32x32"),
        (b"", "not a readable image"),
        (None, "img.bytes holds no bytes"),
        (b"\x89PNG and no more", "not a readable image"),
        (encoded(TRAIN[0])[:700], "not a readable image"),
        (encoded(TRAIN[0], "WEBP")[:700], "not a readable image"),
    ],
)
def test_bad_image_names_file_and_row(parquet_dir, cell, says):
    cells = [encoded(x) for x in TRAIN]
    cells[4] = cell
    write_parquet(parquet_dir / "train.parquet", cells, TRAIN_LABELS)
    with pytest.raises(DataError, match=rf"train\.parquet: row 4: {says}"):
        load(parquet_dir)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"no parquet, only text\n" * 99])
def test_what_is_no_parquet_is_named(parquet_dir, content):
    (parquet_dir / "test.parquet").write_bytes(content)
    with pytest.raises(DataError, match=r"test\.parquet: not a parquet file of CIFAR-100"):
        load(parquet_dir)


def test_truncated_parquet_is_named(parquet_dir):
    path = parquet_dir / "train.parquet"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DataError, match=r"train\.parquet: not a parquet file"):
        load(parquet_dir)


@pytest.mark.parametrize(
    "table",
    [
        pa.table({"img": [{"bytes": b"x", "path": ""}]}),
        pa.table({"img": [b"x"], "fine_label": [1]}),
        pa.table({"img": [{"path": ""}], "fine_label": [1]}),
        pa.table({"img": pa.array([None], IMG), "fine_label": [1]}),
    ],
    ids=["no labels", "no struct", "no bytes", "null"],
)
def test_other_columns_are_refused(parquet_dir, table):
    pyarrow.parquet.write_table(table, parquet_dir / "train.parquet")
    with pytest.raises(DataError, match=r"train\.parquet: not a parquet file of CIFAR-100"):
        load(parquet_dir)


def test_empty_parquet_is_refused(parquet_dir):
    write_parquet(parquet_dir / "train.parquet", [], [])
    with pytest.raises(DataError, match=r"train\.parquet: holds no image"):
        load(parquet_dir)


@pytest.mark.parametrize(("missing", "left"), [("test", "train"), ("train", "test")])
def test_missing_half_is_named(parquet_dir, missing, left):
    (parquet_dir / f"{missing}.parquet").unlink()
    with pytest.raises(DataError, match=rf"no {missing}\*\.parquet beside {left}\.parquet"):
        load(parquet_dir)


# --- cache ------------------------------------------------------------------------------------


@pytest.fixture
def no_decoding(monkeypatch):
    """A function after which any decoding fails."""

    def forbid():
        def fail(*args, **kwargs):
            raise AssertionError("decoded again")

        monkeypatch.setattr(sources, "_decode", fail)

    return forbid


def only_entry(cache_dir: Path) -> Path:
    (entry,) = cache_dir.iterdir()
    return entry


def test_second_load_reads_the_cache(parquet_dir, no_decoding):
    first = load(parquet_dir)
    no_decoding()
    assert_same(load(parquet_dir), first)


def test_changed_files_are_decoded_anew(parquet_dir, no_decoding):
    load(parquet_dir)
    write_parquet(parquet_dir / "test.parquet", [encoded(x) for x in TEST], [0, 1, 2, 3])
    assert load(parquet_dir).test_labels.tolist() == [0, 1, 2, 3]
    no_decoding()
    write_parquet(parquet_dir / "test.parquet", [encoded(x) for x in TEST], [3, 2, 1, 0])
    with pytest.raises(AssertionError, match="decoded again"):
        load(parquet_dir)


@pytest.mark.parametrize("kept", [0, 1, 0.5, -1])
def test_truncated_entry_is_rebuilt(parquet_dir, cache_dir, caplog, no_decoding, kept):
    first = load(parquet_dir)
    entry = only_entry(cache_dir)
    content = entry.read_bytes()
    entry.write_bytes(content[: int(kept * len(content)) if kept == 0.5 else kept])
    assert_same(load(parquet_dir), first)
    assert "damaged and will be rebuilt" in caplog.text
    no_decoding()
    assert_same(load(parquet_dir), first)
    assert only_entry(cache_dir) == entry


def test_no_flipped_byte_of_an_entry_goes_through(parquet_dir, cache_dir, caplog):
    first = load(parquet_dir)
    entry = only_entry(cache_dir)
    content = entry.read_bytes()
    for position in np.random.RandomState(0).choice(len(content), 60, replace=False):
        damaged = bytearray(content)
        damaged[position] ^= 0x10
        entry.write_bytes(damaged)
        assert_same(load(parquet_dir), first)
    assert caplog.text.count("will be rebuilt") > 40  # the rest is zip padding


def write_entry(entry: Path, images: ImageData, **changes) -> None:
    meta = {k: v for k, v in vars(images).items() if k not in ARRAYS}
    arrays = {name: getattr(images, name) for name in ARRAYS} | changes
    with entry.open("wb") as file:
        np.savez(file, meta=np.array(json.dumps(meta)), **arrays)


def test_well_formed_entry_of_other_pixels_is_rebuilt(parquet_dir, cache_dir):
    first = load(parquet_dir)
    pixels = TRAIN.copy()
    pixels[0, 0, 0, 0] ^= 1
    write_entry(only_entry(cache_dir), first, train_images=pixels)
    assert_same(load(parquet_dir), first)


class CreatesFile:
    """Unpickling this creates the file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_planted_pickle_does_what_these_tests_fear(tmp_path):
    pickle.loads(pickle.dumps(CreatesFile(tmp_path / "pwned")))
    assert (tmp_path / "pwned").exists()


def test_entry_is_never_unpickled(parquet_dir, cache_dir, tmp_path):
    first = load(parquet_dir)
    evil = np.array([CreatesFile(tmp_path / "pwned")], dtype=object)
    write_entry(only_entry(cache_dir), first, train_labels=evil)
    assert_same(load(parquet_dir), first)
    assert not (tmp_path / "pwned").exists()


def test_cache_that_cannot_be_written_is_a_warning(parquet_dir, tmp_path, monkeypatch, caplog):
    (tmp_path / "occupied").write_text("a file")
    monkeypatch.setenv("LONGTAIL_CACHE_DIR", str(tmp_path / "occupied"))
    assert_is_the_content(load(parquet_dir))
    assert "not cached" in caplog.text
    assert (tmp_path / "occupied").read_text() == "a file"


def test_cache_that_may_not_be_looked_into_is_a_warning(parquet_dir, tmp_path, monkeypatch, caplog):
    """As a folder of another user, without permission to search it."""
    private, stat = str(tmp_path / "private"), os.stat

    def refuse(path, *arguments, **options):
        if str(path).startswith(private):
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, *arguments, **options)

    monkeypatch.setattr(os, "stat", refuse)
    monkeypatch.setattr(os, "mkdir", lambda path, *_: refuse(path))
    monkeypatch.setenv("LONGTAIL_CACHE_DIR", private)
    assert_is_the_content(load(parquet_dir))
    assert "not cached" in caplog.text
    assert "Permission denied" in caplog.text


def test_failed_write_leaves_nothing_behind(parquet_dir, cache_dir, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    assert_is_the_content(load(parquet_dir))
    assert list(cache_dir.iterdir()) == []


def test_what_a_killed_process_left_is_removed_a_day_later(parquet_dir, cache_dir):
    load(parquet_dir)
    entry = only_entry(cache_dir)
    old, new = (entry.with_name(f"{entry.name}.{pid}.tmp.npz") for pid in (1, 2))
    for file in (old, new):
        file.touch()
    os.utime(old, (0, 0))
    entry.unlink()
    load(parquet_dir)
    assert sorted(cache_dir.iterdir()) == sorted([entry, new])


def test_an_empty_name_of_the_cache_is_none(parquet_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LONGTAIL_CACHE_DIR", "")
    load(parquet_dir)
    assert [file.suffix for file in (tmp_path / ".cache").iterdir()] == [".npz"]
    assert not list(tmp_path.glob("*.npz"))


def test_bad_images_are_not_cached(parquet_dir, cache_dir):
    write_parquet(parquet_dir / "test.parquet", [b"bad"], [0])
    with pytest.raises(DataError):
        load(parquet_dir)
    assert not cache_dir.exists()


# --- a folder of images -----------------------------------------------------------------------


@pytest.fixture
def colour_folder(data_dir) -> Path:
    """zebra and ant; images are single colours that tell half, class and name apart."""
    for name, value in (("zebra", 200), ("ant", 100)):
        for half, offset, files in (("train", 0, ("b", "c", "a")), ("test", 50, ("y", "x"))):
            (data_dir / half / name).mkdir(parents=True)
            for file in files:
                colour = (value + offset + ord(file) % 8, 0, 0)
                Image.new("RGB", (32, 32), colour).save(data_dir / half / name / f"{file}.png")
    return data_dir


def test_folder_is_read_in_order_of_names(colour_folder):
    (colour_folder / "train" / "ant" / "notes.txt").write_text("no image")
    (colour_folder / "train" / "README.md").write_text("no class")
    before = contents(colour_folder)
    images = load_images("images", str(colour_folder))
    assert images.class_names == ("ant", "zebra")
    assert images.train_labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert images.test_labels.tolist() == [0, 0, 1, 1]
    assert images.train_images[:, 5, 5, 0].tolist() == [101, 102, 103, 201, 202, 203]
    assert images.test_images[:, 5, 5, 0].tolist() == [150, 151, 250, 251]
    assert (images.source, images.largest_class) == ("images", 3)
    assert images.index_space == images.fingerprint
    assert contents(colour_folder) == before


def test_what_is_train_and_what_is_test_is_part_of_the_cache_key(data_dir, tmp_path):
    """The same three files, cut into halves at another place, are another source."""
    parts = [TRAIN[:2], TRAIN[2:4], TRAIN[4:6]]
    sizes = []
    for folder, names in (
        (data_dir, ("train-0", "train-1", "test-0")),
        (tmp_path / "other", ("train-0", "test-0", "test-1")),
    ):
        folder.mkdir(exist_ok=True)
        for name, part in zip(names, parts, strict=True):
            write_parquet(folder / f"{name}.parquet", [encoded(x) for x in part], [0, 1])
        images = load(folder)
        sizes.append((len(images.train_labels), len(images.test_labels)))
    assert sizes == [(4, 2), (2, 4)]


@pytest.mark.parametrize("cells", [["text"] * 2, [1, 2], [None, None]])
def test_img_bytes_that_are_no_bytes_are_refused(data_dir, cells):
    write_parquet(data_dir / "test.parquet", [encoded(TRAIN[0])], [0])
    table = pyarrow.table(
        {"img": [{"bytes": x, "path": None} for x in cells], "fine_label": [0, 1]}
    )
    pyarrow.parquet.write_table(table, data_dir / "train.parquet")
    with pytest.raises(DataError, match=r"train\.parquet: row 0: img.bytes holds no bytes"):
        load(data_dir)


def test_an_image_header_with_nonsense_is_a_data_error(colour_folder):
    path = next((colour_folder / "train").rglob("*.png"))
    path.with_suffix(".ppm").write_bytes(b"P6\n2b5 3\n255\n")
    with pytest.raises(DataError, match=r"\.ppm: not a readable image"):
        folder_images(colour_folder)


def test_a_stray_parquet_does_not_hide_official_files(data_dir, monkeypatch):
    files = official_files()
    trust(monkeypatch, files)
    write_official(data_dir, **files)
    write_parquet(data_dir / "train-notes.parquet", [encoded(TRAIN[0])], [0])
    assert load(data_dir).index_space == "torchvision"


def test_largest_class_of_a_folder_is_counted(colour_folder):
    Image.new("RGB", (32, 32)).save(colour_folder / "train" / "zebra" / "d.png")
    assert folder_images(colour_folder).largest_class == 4


def test_what_systems_hide_in_folders_is_passed_over(colour_folder):
    before = folder_images(colour_folder)
    (colour_folder / "train" / ".ipynb_checkpoints").mkdir()
    (colour_folder / "train" / "ant" / "._a.png").write_bytes(b"no image")
    assert folder_images(colour_folder).fingerprint == before.fingerprint


def test_a_link_to_nothing_is_no_smaller_class(colour_folder):
    (colour_folder / "train" / "ant" / "z.png").symlink_to("gone.png")
    with pytest.raises(DataError, match=r"train/ant/z\.png: a link to nothing"):
        folder_images(colour_folder)


def test_folder_is_cached(colour_folder, no_decoding):
    first = folder_images(colour_folder)
    no_decoding()
    assert_same(folder_images(colour_folder), first)


def test_renamed_class_is_another_source(colour_folder):
    first = folder_images(colour_folder)
    for half in ("train", "test"):
        (colour_folder / half / "ant").rename(colour_folder / half / "bee")
    again = folder_images(colour_folder)
    assert again.class_names == ("bee", "zebra")
    assert again.fingerprint != first.fingerprint


@pytest.mark.parametrize("size", [(48, 20), (31, 33), (64, 64), (1, 1)])
def test_other_sizes_are_resized(colour_folder, size):
    pixels = np.random.RandomState(1).randint(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    image.save(colour_folder / "train" / "ant" / "b.png")
    expected = np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC))
    assert np.array_equal(folder_images(colour_folder).train_images[1], expected)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "CMYK"])
def test_other_modes_become_rgb(colour_folder, mode):
    image = Image.fromarray(TRAIN[0]).convert(mode)
    name = "b.png" if mode != "CMYK" else "b.tif"
    (colour_folder / "train" / "ant" / "b.png").unlink()
    image.save(colour_folder / "train" / "ant" / name)
    expected = np.asarray(image.convert("RGB"))
    assert np.array_equal(folder_images(colour_folder).train_images[1], expected)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_more_than_8_bits_a_channel_are_refused(colour_folder, dtype):
    """Pillow would take all above 255 for white."""
    wide = next((colour_folder / "train").rglob("*.png"))
    ramp = np.linspace(0, 60_000, 32 * 32).reshape(32, 32).astype(dtype)
    wide.unlink()
    Image.fromarray(ramp).save(wide.with_suffix(".png" if dtype == np.uint16 else ".tiff"))
    with pytest.raises(DataError, match="give 8 bits a channel"):
        load_images("images", str(colour_folder))


def test_more_images_of_a_class_than_cifar_has_are_refused(data_dir, monkeypatch):
    """A second copy under another name would put the same images on both sides of a split."""
    cells, labels = [encoded(TRAIN[0])] * 501, [7] * 501
    write_parquet(data_dir / "train.parquet", cells, labels)
    write_parquet(data_dir / "test.parquet", [encoded(x) for x in TEST], TEST_LABELS)
    with pytest.raises(
        DataError, match=r"class 7 \(.*\) has 501 training images, of CIFAR-100's 500"
    ):
        load(data_dir)
    write_parquet(data_dir / "train.parquet", cells[1:], labels[1:])
    assert len(load(data_dir).train_labels) == 500


def test_a_second_copy_of_a_parquet_is_refused(parquet_dir):
    copy = parquet_dir / "old" / "test-00000-of-00001.parquet"
    copy.parent.mkdir()
    original = next(parquet_dir.glob("test*.parquet"))
    original = original.rename(parquet_dir / copy.name)
    copy.write_bytes(original.read_bytes())
    with pytest.raises(DataError, match="have one name: keep one"):
        load(parquet_dir)


def test_class_in_one_half_only_is_named(colour_folder):
    (colour_folder / "test" / "ant").rename(colour_folder / "test" / "bee")
    with pytest.raises(DataError, match="same class folders; only in one of them: ant, bee"):
        folder_images(colour_folder)


def test_what_is_left_out_of_class_folders_is_told(colour_folder, caplog):
    (colour_folder / "test" / "zebra" / ".DS_Store").touch()
    before = folder_images(colour_folder)
    assert not caplog.records
    (colour_folder / "test" / "zebra" / "more.png").mkdir()
    (colour_folder / "test" / "zebra" / "photo.jfif").touch()
    assert folder_images(colour_folder).fingerprint == before.fingerprint
    (record,) = caplog.records
    assert "left out 2 entries" in record.getMessage()
    assert record.getMessage().endswith("the first 'test/zebra/more.png'")


@pytest.mark.parametrize("half", ["train", "test"])
def test_class_without_images_is_named(colour_folder, half):
    for path in (colour_folder / half / "zebra").iterdir():
        path.rename(path.with_suffix(".txt"))
    with pytest.raises(DataError, match=f"{half}/zebra holds no image"):
        folder_images(colour_folder)


@pytest.mark.parametrize("kept", [0, 20, 60])
def test_corrupt_file_is_named(colour_folder, kept):
    path = colour_folder / "test" / "zebra" / "x.png"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DataError, match=r"test/zebra/x\.png: not a readable image"):
        folder_images(colour_folder)


def test_huge_image_is_refused_by_its_size(colour_folder, monkeypatch):
    monkeypatch.setattr(sources, "MAX_PIXELS", 40 * 40 - 1)
    Image.new("RGB", (40, 40)).save(colour_folder / "train" / "ant" / "a.png")
    with pytest.raises(DataError, match=r"ant/a\.png: image of 40x40 is too large"):
        folder_images(colour_folder)


def test_folder_without_classes_is_named(data_dir):
    with pytest.raises(DataError, match=rf"data_dir={data_dir}: no train/<class>/ folders.* in /"):
        folder_images(data_dir)


@pytest.mark.parametrize("source", ["images", "cifar100"])
def test_sources_that_need_a_folder_say_so(source):
    with pytest.raises(DataError, match=f"^data_dir=none: source={source} needs a folder"):
        load_images(source, None)


# --- official files ---------------------------------------------------------------------------


def write_official(folder: Path, **files: bytes) -> Path:
    folder = folder / "cifar-100-python"
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def official_files() -> dict[str, bytes]:
    """The three pickles, as the original has them: rows of 1,024 red, green, blue values."""

    def half(pixels, labels):
        rows = pixels.transpose(0, 3, 1, 2).reshape(len(pixels), 3072)
        return pickle.dumps({"data": rows, "fine_labels": labels, "coarse_labels": labels})

    return {
        "train": half(TRAIN, TRAIN_LABELS),
        "test": half(TEST, TEST_LABELS),
        "meta": pickle.dumps({"fine_label_names": NAMES}),
    }


def trust(monkeypatch, files: dict[str, bytes]) -> None:
    """Let torchvision expect the md5 of these files."""
    md5 = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    monkeypatch.setattr(CIFAR100, "train_list", [["train", md5["train"]]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", md5["test"]]])
    monkeypatch.setattr(CIFAR100, "meta", CIFAR100.meta | {"md5": md5["meta"]})


def test_official_files(data_dir, monkeypatch):
    files = official_files()
    trust(monkeypatch, files)
    write_official(data_dir, **files)
    before = contents(data_dir)
    images = load(data_dir)
    assert_is_the_content(images)
    assert images.index_space == "torchvision"
    assert (images.source, images.largest_class) == ("cifar100", 500)
    assert contents(data_dir) == before


def test_official_archive_is_unpacked(data_dir, tmp_path, monkeypatch):
    files = official_files()
    trust(monkeypatch, files)
    archive = data_dir / "cifar-100-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(write_official(tmp_path / "made", **files), "cifar-100-python")
    monkeypatch.setattr(CIFAR100, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    assert_is_the_content(load(data_dir))


def test_official_files_and_parquet_have_one_fingerprint(parquet_dir, tmp_path, monkeypatch):
    files = official_files()
    trust(monkeypatch, files)
    write_official(tmp_path / "official", **files)
    assert load(tmp_path / "official").fingerprint == load(parquet_dir).fingerprint


@pytest.mark.parametrize("damaged", ["train", "test", "meta"])
def test_wrong_md5_is_refused_and_never_unpickled(data_dir, tmp_path, monkeypatch, damaged):
    files = official_files()
    trust(monkeypatch, files)
    evil = pickle.dumps(CreatesFile(tmp_path / "pwned"))
    write_official(data_dir, **files | {damaged: evil})
    with pytest.raises(DataError, match=rf"^data_dir={data_dir}: CIFAR-100 is missing, damaged"):
        load(data_dir)
    assert not (tmp_path / "pwned").exists()


def test_planted_folder_under_the_genuine_md5(data_dir, tmp_path):
    evil = pickle.dumps(CreatesFile(tmp_path / "pwned"))
    write_official(data_dir, train=evil, test=evil, meta=evil)
    with pytest.raises(DataError, match="damaged"):
        load(data_dir)
    assert not (tmp_path / "pwned").exists()


def test_planted_archive_is_not_unpacked(data_dir, tmp_path):
    evil = pickle.dumps(CreatesFile(tmp_path / "pwned"))
    folder = write_official(tmp_path / "made", train=evil, test=evil, meta=evil)
    with tarfile.open(data_dir / "cifar-100-python.tar.gz", "w:gz") as tar:
        tar.add(folder, "cifar-100-python")
    before = contents(data_dir)
    with pytest.raises(DataError, match=f"data_dir={data_dir}"):
        load(data_dir)
    assert contents(data_dir) == before
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("missing", ["train", "test", "meta"])
def test_incomplete_official_folder(data_dir, monkeypatch, missing):
    files = official_files()
    trust(monkeypatch, files)
    write_official(data_dir, **{k: v for k, v in files.items() if k != missing})
    with pytest.raises(DataError, match=f"data_dir={data_dir}.*interrupted download") as refused:
        load(data_dir)
    assert "download=True" not in str(refused.value)  # torchvision's advice, not for here


@pytest.mark.parametrize("there", [True, False])
def test_no_cifar100_says_what_it_looks_like(tmp_path, there):
    folder = tmp_path / "nothing"
    if there:
        folder.mkdir()
    with pytest.raises(DataError, match=rf"^data_dir={folder}: no CIFAR-100 there; expected"):
        load(folder)
    assert folder.exists() == there


def test_a_download_under_way_is_waited_for(data_dir, monkeypatch):
    """Another process has written half of the archive when this one looks."""
    files = official_files()
    trust(monkeypatch, files)
    archive = data_dir / "cifar-100-python.tar.gz"
    archive.write_bytes(b"half")
    other = locks.host_lock(f"data {data_dir.absolute()}").acquire()

    def end(message: str, *values) -> None:
        said.append(message % values)
        archive.unlink()
        write_official(data_dir, **files)
        other.lock.release()

    said: list[str] = []
    monkeypatch.setattr(locks.log, "warning", end)
    assert_is_the_content(load_images("cifar100", str(data_dir), download=True))
    assert said == [f"another process fetches CIFAR-100 into {data_dir}: waiting for its end"]
    assert locks.host_lock(f"data {data_dir.absolute()}").acquire(timeout=0)


@pytest.mark.parametrize("there", [True, False])
def test_failed_download_is_a_data_error(data_dir, there):
    folder = data_dir if there else data_dir / "mis" / "typed"
    with pytest.raises(DataError, match=f"^data_dir={folder}: .* cannot be downloaded"):
        load_images("cifar100", str(folder), download=True)
    assert folder.exists() == there
    assert not (data_dir / "mis").exists()


def test_a_file_is_no_folder_to_download_into(data_dir, caplog):
    file = data_dir / "notes.txt"
    file.touch()
    with pytest.raises(DataError, match=f"^data_dir={file}: is a file: no CIFAR-100"):
        load_images("cifar100", str(file), download=True)
    assert "downloading" not in caplog.text


def test_what_is_on_disk_is_seen(data_dir, parquet_dir, tmp_path):
    assert cifar100_on_disk(parquet_dir)
    assert not cifar100_on_disk(tmp_path / "nothing")
    write_official(tmp_path / "official")
    assert cifar100_on_disk(tmp_path / "official")


# --- the probe --------------------------------------------------------------------------------


class Answer:
    def __init__(self, status: int):
        self.status = status

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None


@pytest.mark.parametrize(("status", "reachable"), [(200, True), (404, False), (503, False)])
def test_probe_asks_for_the_head_of_the_official_address(monkeypatch, status, reachable):
    monkeypatch.delenv("LONGTAIL_OFFLINE", raising=False)
    asked = []

    def answer(request, timeout):
        asked.append((request.full_url, request.get_method()))
        return Answer(status)

    monkeypatch.setattr(urllib.request, "urlopen", answer)
    assert cifar100_can_be_downloaded() is reachable
    assert asked == [(CIFAR100.url, "HEAD")]


@pytest.mark.parametrize(
    "error",
    [urllib.error.URLError("x"), TimeoutError(), ValueError(), http.client.BadStatusLine("x")],
)
def test_probe_that_fails_is_a_no(monkeypatch, error):
    monkeypatch.delenv("LONGTAIL_OFFLINE", raising=False)

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(urllib.request, "urlopen", fail)
    assert cifar100_can_be_downloaded() is False


def test_probe_gives_up_on_an_address_that_hangs(monkeypatch):
    monkeypatch.delenv("LONGTAIL_OFFLINE", raising=False)
    end = threading.Event()

    def hang(*args, **kwargs):
        end.wait()
        return Answer(200)

    monkeypatch.setattr(urllib.request, "urlopen", hang)
    assert cifar100_can_be_downloaded(seconds=0.01) is False
    end.set()


def test_offline_asks_nobody(monkeypatch):
    monkeypatch.setenv("LONGTAIL_OFFLINE", "1")
    monkeypatch.setattr(urllib.request, "urlopen", lambda *a, **k: Answer(200))
    assert cifar100_can_be_downloaded() is False


@pytest.mark.parametrize(
    ("says", "line"),
    [
        ("one line", "one line"),
        ("\n  the first\nthe second", "the first"),
        ("", "ValueError"),
        (
            "failures while downloading:\n## No space left",
            "failures while downloading: ## No space left",
        ),
        (
            "(raised as a result of autoflush)\nreadonly",
            "(raised as a result of autoflush) readonly",
        ),
        (
            "API request to http://x:5/y failed with exception HTTPConnectionPool(host='x'): "
            'Max retries exceeded with url: /y (Caused by NameResolutionError("HTTPConnection('
            "host='x', port=5): Failed to resolve 'x' ([Errno -2] Name or service not known)\"))",
            "Name or service not known",
        ),
    ],
)
def test_what_an_error_says_in_one_line(says, line):
    assert sources.first_line(ValueError(says)) == line
