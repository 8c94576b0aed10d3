"""Image folders: read once into a cache, in order, and refused by name where something is wrong."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from delock.data import cache as cache_module
from delock.data import load
from delock.data.folder import folder
from delock.errors import UsageError

from harness import same_batches

pytestmark = pytest.mark.usefixtures("own_cache")


def picture(path, size=(8, 8), seed=0, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(array).convert(mode).save(path)
    return array


@pytest.fixture
def pictures(tmp_path):
    """Two classes; train 3 + 3, val 2 + 2; the training images as arrays, in order."""
    root, arrays = tmp_path / "pictures", []
    for part, n in (("train", 3), ("val", 2)):
        for c, name in enumerate(("cat", "dog")):
            for i in range(n):
                array = picture(root / part / name / f"{i}.png", seed=100 * n + 10 * c + i)
                arrays += [array] if part == "train" else []
    (root / "train" / "cat" / "notes.txt").write_text("not an image")
    (root / "train" / ".hidden").mkdir()
    return root, np.stack(arrays)


def read_folder(root, **options):
    calls = []
    data = load("folder", data_dir=root, batch_size=4, on_progress=lambda *call: calls.append(call), **options)
    return data, calls


def cache_files(tmp_path):
    return sorted((tmp_path / "cache").iterdir())


def test_folder_reads_all_images_in_order_and_reports_progress(pictures):
    root, arrays = pictures
    data, calls = read_folder(root)
    assert np.array_equal(data.train.images.pixels.numpy(), arrays.transpose(0, 3, 1, 2))
    assert data.train.images.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.test.images.labels.tolist() == [0, 0, 1, 1]
    assert (data.classes, data.channels, data.image_size) == (2, 3, 8)
    assert calls[-1] == (10, 10)
    assert list(data.train.sizes()) == [4, 2]


def test_folder_is_decoded_once(pictures, tmp_path):
    first, _ = read_folder(pictures[0])
    (file,) = cache_files(tmp_path)
    second, calls = read_folder(pictures[0])
    assert calls == []
    assert cache_files(tmp_path) == [file]
    assert same_batches(list(first.train.epoch(0)), list(second.train.epoch(0)))


def test_folder_that_changed_is_decoded_again(pictures, tmp_path):
    root, _ = pictures
    read_folder(root)
    new = picture(root / "train" / "cat" / "0.png", seed=77)
    os.utime(root / "train" / "cat" / "0.png", ns=(1, 1))
    data, calls = read_folder(root)
    assert calls
    assert np.array_equal(data.train.images.pixels[0].numpy(), new.transpose(2, 0, 1))
    (root / "val" / "dog" / "1.png").unlink()
    assert len(read_folder(root)[0].test.images) == 3
    assert len(cache_files(tmp_path)) == 1  # the old one was replaced


@pytest.mark.parametrize("damage", ["empty", "cut", "bit", "other"])
def test_damaged_cache_is_made_again(pictures, tmp_path, damage):
    good, _ = read_folder(pictures[0])
    want = good.train.images.pixels.clone()
    (file,) = cache_files(tmp_path)
    content = file.read_bytes()
    at = content.index(want.numpy().tobytes())
    file.unlink()  # `good` still maps the old file: do not write into that
    if damage == "other":
        torch.save({"something": "else"}, file)
    else:
        file.write_bytes({"empty": b"", "cut": content[: len(content) // 2], "bit": content[:at] + b"\0\1\2" + content[at + 3 :]}[damage])
    data, calls = read_folder(pictures[0])
    assert calls
    assert torch.equal(data.train.images.pixels, want)
    assert read_folder(pictures[0])[1] == []


def test_failed_write_leaves_nothing_and_says_what_to_do(pictures, tmp_path, monkeypatch):
    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(cache_module.torch, "save", full)
    with pytest.raises(UsageError, match=r"no space left on device.*DELOCK_CACHE"):
        read_folder(pictures[0])
    assert cache_files(tmp_path) == []


def test_folder_loader_travels_as_a_path(tmp_path):
    for part in ("train", "test"):
        for name in ("a", "b"):
            picture(tmp_path / "big" / part / name / "0.png", (100, 100))
    data, _ = read_folder(tmp_path / "big")
    pickled = pickle.dumps(data.train)
    assert len(pickled) < 2500  # the images are 60,000 bytes
    assert same_batches(list(data.train.epoch(2)), list(pickle.loads(pickled).epoch(2)))
    assert same_batches(list(data.test.epoch(0)), list(pickle.loads(pickle.dumps(data.test)).epoch(0)))
    cache_files(tmp_path)[0].unlink()
    with pytest.raises(UsageError, match="start the run again"):
        pickle.loads(pickled)


def test_folder_makes_colours_of_grey_and_transparent(pictures):
    root, _ = pictures
    for i, mode in enumerate(("L", "RGBA", "P")):
        picture(root / "train" / "dog" / f"{i}.png", mode=mode)
    assert read_folder(root)[0].train.images.pixels.shape == (6, 3, 8, 8)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_folder_takes_the_upper_bits_of_deep_images(pictures, suffix):
    """256 grey values from dark to light, in 16 bits: all of them would be white if they were cut off at 255."""
    root, _ = pictures
    (root / "train" / "cat" / "0.png").unlink()
    ramp = (np.arange(64, dtype=np.uint16) * 1024).reshape(8, 8)
    Image.fromarray(ramp).save(root / "train" / "cat" / f"0.{suffix}")
    found = read_folder(root)[0].train.images.pixels[0].numpy()
    assert (found == (ramp >> 8)[None]).all()


@pytest.mark.parametrize(("kind", "what"), [(np.float32, "floating numbers"), (np.int32, "whole numbers of 32 bits")])
def test_folder_refuses_pixels_of_unknown_range(pictures, kind, what):
    root, _ = pictures
    Image.fromarray(np.ones((8, 8), kind)).save(root / "train" / "cat" / "a.tif")
    with pytest.raises(UsageError, match=rf"the pixels of .*a\.tif are {what}"):
        read_folder(root)


def test_folder_resizes_only_what_differs(pictures):
    root, arrays = pictures
    picture(root / "train" / "dog" / "1.png", (20, 10))
    with pytest.raises(UsageError, match=r"dog.1\.png is 20 x 10, but .*cat.0\.png is 8 x 8: give --image-size"):
        read_folder(root)
    pixels = read_folder(root, image_size=8)[0].train.images.pixels.numpy()
    keep = [0, 1, 2, 3, 5]
    assert np.array_equal(pixels[keep], arrays.transpose(0, 3, 1, 2)[keep])
    assert read_folder(root, image_size=6)[0].train.images.pixels.shape == (6, 3, 6, 6)


def replace(root, part, text):
    (root / part).write_bytes(text)


def cut_jpeg(root):
    picture(root / "train" / "dog" / "x.jpg", (64, 64))
    file = root / "train" / "dog" / "x.jpg"
    replace(root, "train/dog/x.jpg", file.read_bytes()[:-900])


def drop_class(root):
    (root / "val" / "dog").rename(root / "val" / "fox")


def empty_class(root):
    (root / "train" / "emu").mkdir()


def no_class(root):
    (root / "val").rename(root / "old")
    (root / "test").mkdir()


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda root: replace(root, "train/dog/1.png", b"no image"), r"cannot read the image .*dog.1\.png"),
        (lambda root: replace(root, "val/cat/0.png", b""), r"cannot read the image .*cat.0\.png"),
        (cut_jpeg, r"cannot read the image .*x\.jpg"),
        (lambda root: picture(root / "train" / "cat" / "0.png", (8, 9)), r"0\.png is 8 x 9, not square"),
        (drop_class, "lacks dog.* lacks fox"),
        (empty_class, "emu holds no image"),
        (no_class, "holds no class"),
        (lambda root: (root / "val").rename(root / "old"), "has no test directory"),
        (lambda root: (root / "train").rename(root / "old"), "has no train directory"),
        (lambda root: root.rename(root.parent / "gone"), "does not exist"),
    ],
)
def test_folder_refuses(pictures, tmp_path, spoil, says):
    spoil(pictures[0])
    with pytest.raises(UsageError, match=says):
        read_folder(pictures[0])
    assert not (tmp_path / "cache").exists()


def test_folder_refuses_image_size_below_one(pictures):
    with pytest.raises(UsageError, match="at least 1"):
        folder(pictures[0], image_size=0)


def test_folder_on_real_jpegs(tmp_path):
    if "DELOCK_DATA" not in os.environ:
        pytest.skip("DELOCK_DATA is not set")
    for part, n in (("train", 40), ("test", 10)):
        for name in ("bird", "ship"):
            (tmp_path / "some" / part / name).mkdir(parents=True)
            for file in sorted((Path(os.environ["DELOCK_DATA"]) / part / name).iterdir())[:n]:
                (tmp_path / "some" / part / name / file.name).symlink_to(file)
    data, calls = read_folder(tmp_path / "some")
    assert data.train.images.pixels.shape == (80, 3, 32, 32)
    assert calls == [(64, 100), (100, 100)]
