"""Data: order, augmentation and normalisation; the embedded digits; image folders and their cache; torchvision's sets; own iterables."""

import os
import pickle
import random
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, TensorDataset

from delock.data import NAMES, Augment, Batches, Images, as_loader, load, statistics, synthetic
from delock.data import cache as cache_module
from delock.data.augment import standard
from delock.data.folder import folder
from delock.data.hashing import permutation, splitmix64
from delock.data.images import Statistics
from delock.errors import UsageError

RAW = Statistics((0.0,), (1 / 255,))  # normalisation that leaves bytes 0 .. 255 as they are


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DELOCK_CACHE", str(tmp_path / "cache"))


def numbered(n=50, size=8, channels=1):
    """n images, all different; the label of an image is its index."""
    pixels = torch.randint(0, 256, (n, channels, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Images(pixels, torch.arange(n))


def by_sample(loader, e=0):
    return {int(y): x for xs, ys in loader.epoch(e) for x, y in zip(xs, ys, strict=True)}


def same(a, b):
    return all(torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(a, b, strict=True))


# hashing


def test_splitmix64_gives_the_published_sequence():
    assert splitmix64(1234567, np.arange(5)).tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def test_a_counter_gives_its_number_alone_and_keys_give_others():
    assert splitmix64(7, np.array([3, 1])).tolist() == splitmix64(7, np.arange(4))[[3, 1]].tolist()
    assert splitmix64(2**63 - 1, np.arange(4)).tolist() != splitmix64(7, np.arange(4)).tolist()


def test_permutation_is_one_and_stays_the_same():
    assert sorted(permutation(5, 1000).tolist()) == list(range(1000))
    assert permutation(5, 8).tolist() == [3, 4, 2, 5, 0, 7, 1, 6]  # pinned: runs are to be repeatable with later versions


# augmentation


def test_augment_equals_the_plain_definition():
    pixels = numbered(20, 6, 3).pixels.numpy()
    augment = Augment(2, flip=True)
    got = augment(pixels, np.arange(20), 99)
    for i, bits in enumerate(int(z) for z in splitmix64(99, np.arange(20))):
        padded = np.pad(pixels[i], ((0, 0), (2, 2), (2, 2)))
        top, left = (bits & 0xFFFFFF) * 5 >> 24, ((bits >> 24) & 0xFFFFFF) * 5 >> 24
        want = padded[:, top : top + 6, left : left + 6]
        assert np.array_equal(got[i], want[..., ::-1] if bits >> 63 else want)


def test_augment_uses_every_place_equally_and_flips_half():
    n = 20000
    dot = np.zeros((n, 1, 9, 9), np.uint8)
    dot[:, :, 4, 4] = 1
    seen = Augment(4, flip=False)(dot, np.arange(n), 1).sum(0)[0]
    assert (abs(seen - n / 81) < 6 * (n / 81) ** 0.5).all()
    mark = np.zeros((n, 1, 1, 2), np.uint8)
    mark[..., 0] = 1
    assert abs(Augment(0, flip=True)(mark, np.arange(n), 1)[:, 0, 0, 0].mean() - 0.5) < 0.02


@pytest.mark.parametrize(("size", "padding"), [(8, 1), (28, 4), (32, 4), (224, 4)])
def test_standard_padding(size, padding):
    assert standard(size, flip=True) == Augment(padding, True)


# Batches


def test_an_epoch_holds_every_sample_once_and_the_last_batch_what_is_left():
    loader = Batches(numbered(50), 16, RAW, shuffle=True)
    batches = list(loader.epoch(0))
    assert [len(y) for _, y in batches] == loader.sizes() == [16, 16, 16, 2]
    assert len(loader) == 4
    assert sorted(torch.cat([y for _, y in batches]).tolist()) == list(range(50))
    assert {x.dtype for x, _ in batches} == {torch.float32}
    assert {y.dtype for _, y in batches} == {torch.int64}
    assert Batches(numbered(48), 16, RAW).sizes() == [16, 16, 16]


def test_an_epoch_is_a_function_of_seed_and_epoch():
    one, two = (Batches(numbered(), 16, RAW, seed=3, shuffle=True, augment=Augment(2, True)) for _ in range(2))
    later = list(two.epoch(1))
    assert same(list(one.epoch(0)), list(two.epoch(0)))
    assert same(list(one.epoch(1)), later)
    orders = [loader.order(e).tolist() for loader, e in ((one, 0), (one, 1), (Batches(numbered(), 16, RAW, seed=4, shuffle=True), 0))]
    assert len({tuple(order) for order in orders}) == 3
    first, second = by_sample(one, 0), by_sample(one, 1)
    assert sum(torch.equal(first[i], second[i]) for i in range(50)) < 10


def test_a_sample_looks_the_same_in_any_batch_size_and_under_any_limit():
    whole = by_sample(Batches(numbered(), 16, RAW, shuffle=True, augment=Augment(2, True)), 5)
    for size, samples in ((7, None), (50, None), (4, np.array([3, 8, 40]))):
        part = by_sample(Batches(numbered(), size, RAW, shuffle=True, augment=Augment(2, True), samples=samples), 5)
        assert len(part) == (50 if samples is None else 3)
        assert all(torch.equal(x, whole[i]) for i, x in part.items())


def test_nothing_touches_the_stored_images_or_the_batches_handed_out():
    images = numbered()
    before = images.pixels.clone()
    loader = Batches(images, 16, RAW, shuffle=True, augment=Augment(0, True))
    batches = list(loader.epoch(0))
    for x, _ in batches:
        x.zero_()
    assert torch.equal(images.pixels, before)
    assert next(loader.epoch(0))[0].abs().sum() > 0


def test_without_shuffle_and_augmentation_the_images_come_as_they_are():
    images = numbered(10)
    (x, y), *_ = Batches(images, 10, RAW).epoch(3)
    assert y.tolist() == list(range(10))
    assert torch.allclose(x, images.pixels.float())


def test_statistics_and_normalisation():
    images = numbered(3000, 4, 3)
    stats = statistics(images)
    scaled = images.pixels.double() / 255
    assert torch.allclose(torch.tensor(stats.mean), scaled.mean((0, 2, 3)).float())
    assert torch.allclose(torch.tensor(stats.std), scaled.std((0, 2, 3), correction=0).float())
    ((x, _),) = Batches(images, 3000, stats).epoch(0)
    mean, std = (torch.tensor(v, dtype=torch.float64).reshape(3, 1, 1) for v in (stats.mean, stats.std))
    assert torch.allclose(x.double(), (scaled - mean) / std, atol=1e-6)
    black = Images(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.arange(2))
    assert next(Batches(black, 2, statistics(black)).epoch(0))[0].eq(0).all()


def test_images_and_batch_size_are_checked():
    with pytest.raises(UsageError, match="uint8 tensor"):
        Images(torch.zeros(2, 1, 4, 4), torch.arange(2))
    with pytest.raises(UsageError, match="one per image"):
        Images(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.arange(3))
    with pytest.raises(UsageError, match="at least 1, not 0"):
        Batches(numbered(), 0, RAW)


# named sets


def test_digits():
    data = load("digits", batch_size=64, seed=5)
    assert (data.classes, data.channels, data.image_size, data.name) == (10, 1, 8, "digits")
    assert (sum(data.train.sizes()), sum(data.test.sizes())) == (1437, 360)
    train, test = data.train.images, data.test.images
    for c in range(10):  # stratified
        assert abs((test.labels == c).sum().item() / 360 - (train.labels == c).sum().item() / 1437) < 0.003
    assert torch.equal(test.pixels, load("digits", batch_size=8, seed=6).test.images.pixels)
    assert data.train.augment == Augment(1, flip=False)
    assert data.test.augment is None
    plain = load("digits", batch_size=1437, augment=False)
    ((x, _),) = plain.train.epoch(0)
    assert x.shape == (1437, 1, 8, 8)
    assert abs(x.mean()) < 1e-5
    assert abs(x.std() - 1) < 1e-3
    assert same(list(data.test.epoch(0)), list(data.test.epoch(1)))


def test_limit_takes_a_fixed_part_and_leaves_test_and_statistics():
    full, large, small = (load("synthetic", batch_size=32, limit=n) for n in (None, 100, 40))
    assert (sum(large.train.sizes()), sum(small.train.sizes())) == (100, 40)
    assert set(small.train.samples) < set(large.train.samples)
    assert len(set((small.train.samples % 10).tolist())) > 5  # not the first class alone
    assert small.test.sizes() == full.test.sizes()
    assert same(list(small.test.epoch(0)), list(full.test.epoch(0)))
    assert set(small.train.samples) == set(load("synthetic", batch_size=8, limit=40, seed=9).train.samples)


def test_synthetic_has_the_shape_asked_for_and_is_seeded():
    made = synthetic(30, 10, channels=2, image_size=5, classes=3, seed=1)
    assert made.train.pixels.shape == (30, 2, 5, 5)
    assert (len(made.test), made.classes, made.train.labels.max().item()) == (10, 3, 2)
    assert torch.equal(made.train.pixels, synthetic(30, 10, channels=2, image_size=5, classes=3, seed=1).train.pixels)
    assert not torch.equal(made.train.pixels, synthetic(30, 10, channels=2, image_size=5, classes=3, seed=2).train.pixels)
    assert load("synthetic", batch_size=32, image_size=16, test_batch_size=100).test.sizes() == [100] * 5 + [12]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"name": "cifar"}, "unknown data set 'cifar': did you mean 'cifar10'"),
        ({"name": "qqq"}, "known: digits"),
        ({"name": "digits", "batch_size": 0}, "batch size"),
        ({"name": "synthetic", "test_batch_size": 0}, "batch size"),
        ({"name": "synthetic", "limit": 0}, "limit must lie between 1 and the 2048"),
        ({"name": "synthetic", "limit": 2049}, "limit must lie between"),
        ({"name": "synthetic", "image_size": 0}, "image_size must be at least 1"),
        ({"name": "digits", "image_size": 32}, "image size can be chosen for folder"),
        ({"name": "folder"}, "--data-dir"),
    ],
)
def test_load_refuses(arguments, says):
    with pytest.raises(UsageError, match=says):
        load(**{"batch_size": 16, **arguments})


def test_every_named_loader_can_be_pickled_mid_run():
    data = load("digits", batch_size=64)
    assert same(list(data.train.epoch(1)), list(pickle.loads(pickle.dumps(data.train)).epoch(1)))
    assert set(NAMES) == {"digits", "cifar10", "cifar100", "mnist", "fashion-mnist", "folder", "synthetic"}


# torchvision's sets


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "mnist", "fashion-mnist"])
def test_missing_torchvision_set_says_how_to_get_it(name, tmp_path):
    with pytest.raises(UsageError, match=r"--download.*--data-dir"):
        load(name, data_dir=tmp_path, batch_size=8)
    assert list(tmp_path.iterdir()) == []


def test_failing_download_is_a_usage_error(tmp_path, monkeypatch):
    import torchvision.datasets

    def offline(self):
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.datasets.CIFAR10, "download", offline)
    with pytest.raises(UsageError, match="no route to host"):
        load("cifar10", data_dir=tmp_path, batch_size=8, download=True)


def idx(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes())


def test_mnist_from_its_files(tmp_path):
    rng = np.random.default_rng(0)
    pixels = {}
    for part, n in (("train", 12), ("t10k", 5)):
        pixels[part] = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        idx(tmp_path / f"MNIST/raw/{part}-images-idx3-ubyte", pixels[part])
        idx(tmp_path / f"MNIST/raw/{part}-labels-idx1-ubyte", (np.arange(n) % 10).astype(np.uint8))
    data = load("mnist", data_dir=tmp_path, batch_size=5)
    assert np.array_equal(data.train.images.pixels[:, 0].numpy(), pixels["train"])
    assert data.test.images.labels.tolist() == [0, 1, 2, 3, 4]
    assert data.train.augment == Augment(4, flip=False)
    assert (data.channels, data.image_size, data.train.sizes()) == (1, 28, [5, 5, 2])


def test_cifar10_from_its_files(tmp_path, monkeypatch):
    import torchvision.datasets.cifar as cifar

    monkeypatch.setattr(cifar, "check_integrity", lambda *_: True)  # the real files' checksums
    raw = np.random.default_rng(0).integers(0, 256, (6, 4, 3072), dtype=np.uint8)
    base = tmp_path / "cifar-10-batches-py"
    base.mkdir()
    for i, name in enumerate([*(f"data_batch_{j}" for j in range(1, 6)), "test_batch"]):
        (base / name).write_bytes(pickle.dumps({"data": raw[i], "labels": [i, i + 1, i + 2, i + 3]}))
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    data = load("cifar10", data_dir=tmp_path, batch_size=8)
    assert torch.equal(data.train.images.pixels, torch.from_numpy(raw[:5].reshape(20, 3, 32, 32)))
    assert data.test.images.labels.tolist() == [5, 6, 7, 8]
    assert data.train.augment == Augment(4, flip=True)


# image folders


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
    assert same(list(first.train.epoch(0)), list(second.train.epoch(0)))


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
    assert same(list(data.train.epoch(2)), list(pickle.loads(pickled).epoch(2)))
    assert same(list(data.test.epoch(0)), list(pickle.loads(pickle.dumps(data.test)).epoch(0)))
    cache_files(tmp_path)[0].unlink()
    with pytest.raises(UsageError, match="start the run again"):
        pickle.loads(pickled)


def test_folder_makes_colours_of_grey_and_transparent(pictures):
    root, _ = pictures
    for i, mode in enumerate(("L", "RGBA", "P")):
        picture(root / "train" / "dog" / f"{i}.png", mode=mode)
    assert read_folder(root)[0].train.images.pixels.shape == (6, 3, 8, 8)


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


# one's own data


class Noisy(Dataset):
    """A data set whose samples are drawn from every default generator."""

    def __init__(self, n=10):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        if i >= self.n:
            raise IndexError
        return torch.tensor([float(i), torch.rand(()).item(), np.random.rand(), random.random()]), torch.tensor(i)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(Noisy())


def noisy_loader(**options):
    return DataLoader(Noisy(), batch_size=4, **{"shuffle": True, **options})


GENERATORS = {
    "default": lambda: noisy_loader(),
    "own generator": lambda: noisy_loader(generator=torch.Generator()),
    "own sampler": lambda: noisy_loader(shuffle=False, sampler=RandomSampler(Noisy(), generator=torch.Generator())),
    "two workers": lambda: noisy_loader(num_workers=2, multiprocessing_context="fork"),
}


@pytest.mark.parametrize("kind", GENERATORS)
def test_own_data_is_a_function_of_seed_epoch_and_batch(kind):
    one, two = (as_loader(GENERATORS[kind](), seed=1) for _ in range(2))
    want = {e: list(one.epoch(e)) for e in range(2)}
    got = {}
    for e in (1, 0):
        got[e] = []
        for batch in two.epoch(e):
            got[e].append(batch)
            torch.rand(3), np.random.rand(5), random.random()  # dropout of another stage, say
    assert same(want[0], got[0])
    assert same(want[1], got[1])
    assert not same(want[0], want[1])
    assert not same(want[0], list(as_loader(GENERATORS[kind](), seed=2).epoch(0)))
    assert len({row for x, _ in want[0] for row in x[:, 1].tolist()}) == 10  # a new number for each sample


def test_the_process_goes_on_with_its_own_random_numbers():
    def draws(batches):
        torch.manual_seed(0), np.random.seed(0), random.seed(0)
        return [(torch.rand(()).item(), np.random.rand(), random.random()) for _ in batches]

    assert draws(as_loader(noisy_loader()).epoch(0)) == draws(range(3))


class Counting(list):
    epochs: tuple[int, ...] = ()

    def set_epoch(self, e):
        self.epochs += (e,)


def test_set_epoch_is_called_on_the_object_and_on_its_sampler():
    own = Counting([(torch.ones(2), torch.ones(2))])
    list(as_loader(own).epoch(4))
    sampler = Counting(range(10))
    list(as_loader(DataLoader(Noisy(), sampler=sampler)).epoch(5))
    assert (own.epochs, sampler.epochs) == ((4,), (5,))


def test_sizes_are_known_where_they_can_be():
    assert as_loader(noisy_loader()).sizes() == [4, 4, 2]
    assert as_loader(noisy_loader(drop_last=True)).sizes() == [4, 4]
    assert as_loader(noisy_loader(), batches_per_epoch=2).sizes() == [4, 4]
    assert as_loader([(torch.ones(3, 2), 0), ((torch.ones(1, 2), torch.ones(1)), 0)]).sizes() == [3, 1]
    assert as_loader(DataLoader(Stream(), batch_size=4), batches_per_epoch=3).sizes() is None
    assert as_loader(DataLoader(Noisy(), batch_sampler=[[0, 1], [2]])).sizes() is None
    assert as_loader(DataLoader(Noisy(), batch_size=None)).sizes() is None
    assert as_loader([("text", 0)]).sizes() is None


def test_tuples_of_inputs_and_any_targets_pass():
    pair = (torch.ones(2), torch.zeros(2))
    ((inputs, targets),) = as_loader([(list(pair), {"y": pair})]).epoch(0)
    assert isinstance(inputs, tuple)
    assert targets == {"y": pair}
    torch_pairs = DataLoader(TensorDataset(torch.arange(6.0), torch.arange(6)), batch_size=4)
    assert [y.tolist() for _, y in as_loader(torch_pairs).epoch(0)] == [[0, 1, 2, 3], [4, 5]]


def test_a_loader_stays_itself_and_a_plain_one_can_be_pickled():
    ours = Batches(numbered(), 16, RAW)
    assert as_loader(ours) is ours
    plain = as_loader(noisy_loader(), seed=3)
    assert as_loader(plain) is plain
    assert same(list(plain.epoch(1)), list(pickle.loads(pickle.dumps(plain)).epoch(1)))


def test_a_stream_needs_the_number_of_batches():
    with pytest.raises(UsageError, match="batches_per_epoch"):
        as_loader(DataLoader(Stream(), batch_size=4))
    loader = as_loader(DataLoader(Stream(), batch_size=4), batches_per_epoch=2)
    assert len(loader) == len(list(loader.epoch(0))) == 2


@pytest.mark.parametrize(
    ("obj", "says"),
    [
        ([torch.ones(2)], "batch 0 of epoch 7 of the data is a Tensor, not a pair"),
        ([(torch.ones(2), torch.ones(2), torch.ones(2))], "is a tuple of 3, not a pair"),
        ([{"x": 1, "y": 2}], "is a dict of 2, not a pair"),
        ([([1.0, 2.0], 3)], "inputs of batch 0 .* are a list, not a tensor"),
        ([(np.ones(3), 3)], "are a ndarray, not a tensor"),
    ],
)
def test_items_that_are_no_pairs_are_refused(obj, says):
    with pytest.raises(UsageError, match=says):
        list(as_loader(obj).epoch(7))


def test_an_epoch_that_ends_early_names_both_numbers():
    once = (pair for pair in [(torch.ones(2), 0)] * 3)
    loader = as_loader(once, batches_per_epoch=2)
    assert len(list(loader.epoch(0))) == 2
    with pytest.raises(UsageError, match="epoch 1 of the data ended after 1 batches, where its length promised 2"):
        list(loader.epoch(1))


@pytest.mark.parametrize(("obj", "batches", "says"), [(3, None, "iterable"), ([], None, "at least one"), ([1], 0, "at least one")])
def test_what_cannot_be_a_loader_is_refused(obj, batches, says):
    with pytest.raises(UsageError, match=says):
        as_loader(obj, batches_per_epoch=batches)
