"""Data: named sets, the embedded digits, torchvision's, and own iterables."""

import pickle
import random
import struct

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from delock.data import NAMES, Augment, as_loader, load, synthetic
from delock.data.digits import stratified_split
from delock.errors import UsageError

from harness import same_batches

pytestmark = pytest.mark.usefixtures("own_cache")


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
    assert same_batches(list(data.test.epoch(0)), list(data.test.epoch(1)))


def test_digits_are_what_scikit_learn_makes_of_them():
    found = load_digits()
    train, test = train_test_split(np.arange(1797), test_size=360, stratify=found.target, random_state=0)
    data = load("digits", batch_size=64)
    for images, chosen in ((data.train.images, train), (data.test.images, test)):
        assert np.array_equal(images.pixels[:, 0], found.images[chosen] * 15)
        assert np.array_equal(images.labels, found.target[chosen])


def test_a_stratified_split_is_scikit_learn_s():
    generator = np.random.RandomState(1)
    for n in (60, 61, 200):
        labels = np.concatenate([np.arange(6), np.arange(6), generator.randint(0, 6, n)])
        for got, want in zip(
            stratified_split(labels, 30, np.random.RandomState(n)),
            train_test_split(np.arange(len(labels)), test_size=30, stratify=labels, random_state=n),
            strict=True,
        ):
            assert np.array_equal(got, want)


def test_limit_takes_a_fixed_part_and_leaves_test_and_statistics():
    full, large, small = (load("synthetic", batch_size=32, limit=n) for n in (None, 100, 40))
    assert (sum(large.train.sizes()), sum(small.train.sizes())) == (100, 40)
    assert set(small.train.samples) < set(large.train.samples)
    assert len(set((small.train.samples % 10).tolist())) > 5  # not the first class alone
    assert small.test.sizes() == full.test.sizes()
    assert same_batches(list(small.test.epoch(0)), list(full.test.epoch(0)))
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
    assert same_batches(list(data.train.epoch(1)), list(pickle.loads(pickle.dumps(data.train)).epoch(1)))
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


@pytest.mark.usefixtures("own_random")
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
    assert same_batches(want[0], got[0])
    assert same_batches(want[1], got[1])
    assert not same_batches(want[0], want[1])
    assert not same_batches(want[0], list(as_loader(GENERATORS[kind](), seed=2).epoch(0)))
    assert len({row for x, _ in want[0] for row in x[:, 1].tolist()}) == 10  # a new number for each sample


@pytest.mark.usefixtures("own_random")
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
    ours = load("digits", batch_size=16).train
    assert as_loader(ours) is ours
    plain = as_loader(noisy_loader(), seed=3)
    assert as_loader(plain) is plain
    assert same_batches(list(plain.epoch(1)), list(pickle.loads(pickle.dumps(plain)).epoch(1)))


@pytest.mark.usefixtures("own_random")
def test_a_loader_that_keeps_its_iterator_can_be_pickled_once_it_has_been_read():
    loader = as_loader(StatefulDataLoader(TensorDataset(torch.arange(12.0)[:, None], torch.arange(12)), 4, shuffle=True))
    next(loader.epoch(0))
    assert same_batches(pickle.loads(pickle.dumps(loader)).epoch(0), list(loader.epoch(0)))


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
        ([{"x": 1, "y": 2}], "batch 0 of epoch 7 of the data has no entry 'labels' among 'x', 'y'"),
        ([([1.0, 2.0], 3)], "inputs of batch 0 .* are a list, not a tensor"),
        ([(np.array(["text"]), 3)], "batch 0 .* of the data: an array of <U4 cannot become a tensor"),
    ],
)
def test_items_that_are_no_pairs_are_refused(obj, says):
    with pytest.raises(UsageError, match=says):
        list(as_loader(obj).epoch(7))


def test_an_epoch_that_ends_early_names_both_numbers():
    class Shrinking:
        left = 3

        def __iter__(self):
            self.left -= 1
            return iter([(torch.ones(2), 0)] * self.left)

    loader = as_loader(Shrinking(), batches_per_epoch=2)
    assert len(list(loader.epoch(0))) == 2
    with pytest.raises(UsageError, match="epoch 1 of the data ended after 1 batches, where its length promised 2"):
        list(loader.epoch(1))


@pytest.mark.parametrize(("obj", "batches", "says"), [(3, None, "iterable"), ([], None, "at least one"), ([1], 0, "at least one")])
def test_what_cannot_be_a_loader_is_refused(obj, batches, says):
    with pytest.raises(UsageError, match=says):
        as_loader(obj, batches_per_epoch=batches)
