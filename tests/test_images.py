"""Images in batches: order, augmentation and normalisation are functions of seed, epoch and sample."""

import numpy as np
import pytest
import torch

from delock.data import Augment, ImageBatches, Images, statistics
from delock.data.augment import standard
from delock.data.hashing import permutation, splitmix64
from delock.data.images import Statistics
from delock.errors import UsageError

from harness import same_batches

RAW = Statistics((0.0,), (1 / 255,))  # normalisation that leaves bytes 0 .. 255 as they are


def numbered(n=50, size=8, channels=1):
    """n images, all different; the label of an image is its index."""
    pixels = torch.randint(0, 256, (n, channels, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Images(pixels, torch.arange(n))


def by_sample(loader, e=0):
    return {int(y): x for xs, ys in loader.epoch(e) for x, y in zip(xs, ys, strict=True)}


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


# ImageBatches


def test_an_epoch_holds_every_sample_once_and_the_last_batch_what_is_left():
    loader = ImageBatches(numbered(50), 16, RAW, shuffle=True)
    batches = list(loader.epoch(0))
    assert [len(y) for _, y in batches] == loader.sizes() == [16, 16, 16, 2]
    assert len(loader) == 4
    assert sorted(torch.cat([y for _, y in batches]).tolist()) == list(range(50))
    assert {x.dtype for x, _ in batches} == {torch.float32}
    assert {y.dtype for _, y in batches} == {torch.int64}
    assert ImageBatches(numbered(48), 16, RAW).sizes() == [16, 16, 16]


def test_an_epoch_is_a_function_of_seed_and_epoch():
    one, two = (ImageBatches(numbered(), 16, RAW, seed=3, shuffle=True, augment=Augment(2, True)) for _ in range(2))
    later = list(two.epoch(1))
    assert same_batches(list(one.epoch(0)), list(two.epoch(0)))
    assert same_batches(list(one.epoch(1)), later)
    orders = [loader.order(e).tolist() for loader, e in ((one, 0), (one, 1), (ImageBatches(numbered(), 16, RAW, seed=4, shuffle=True), 0))]
    assert len({tuple(order) for order in orders}) == 3
    first, second = by_sample(one, 0), by_sample(one, 1)
    assert sum(torch.equal(first[i], second[i]) for i in range(50)) < 10


def test_a_sample_looks_the_same_in_any_batch_size_and_under_any_limit():
    whole = by_sample(ImageBatches(numbered(), 16, RAW, shuffle=True, augment=Augment(2, True)), 5)
    for size, samples in ((7, None), (50, None), (4, np.array([3, 8, 40]))):
        part = by_sample(ImageBatches(numbered(), size, RAW, shuffle=True, augment=Augment(2, True), samples=samples), 5)
        assert len(part) == (50 if samples is None else 3)
        assert all(torch.equal(x, whole[i]) for i, x in part.items())


def test_nothing_touches_the_stored_images_or_the_batches_handed_out():
    images = numbered()
    before = images.pixels.clone()
    loader = ImageBatches(images, 16, RAW, shuffle=True, augment=Augment(0, True))
    batches = list(loader.epoch(0))
    for x, _ in batches:
        x.zero_()
    assert torch.equal(images.pixels, before)
    assert next(loader.epoch(0))[0].abs().sum() > 0


def test_without_shuffle_and_augmentation_the_images_come_as_they_are():
    images = numbered(10)
    (x, y), *_ = ImageBatches(images, 10, RAW).epoch(3)
    assert y.tolist() == list(range(10))
    assert torch.allclose(x, images.pixels.float())


def test_statistics_and_normalisation():
    images = numbered(3000, 4, 3)
    stats = statistics(images)
    scaled = images.pixels.double() / 255
    assert torch.allclose(torch.tensor(stats.mean), scaled.mean((0, 2, 3)).float())
    assert torch.allclose(torch.tensor(stats.std), scaled.std((0, 2, 3), correction=0).float())
    ((x, _),) = ImageBatches(images, 3000, stats).epoch(0)
    mean, std = (torch.tensor(v, dtype=torch.float64).reshape(3, 1, 1) for v in (stats.mean, stats.std))
    assert torch.allclose(x.double(), (scaled - mean) / std, atol=1e-6)
    black = Images(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.arange(2))
    assert next(ImageBatches(black, 2, statistics(black)).epoch(0))[0].eq(0).all()


def test_images_and_batch_size_are_checked():
    with pytest.raises(UsageError, match="uint8 tensor"):
        Images(torch.zeros(2, 1, 4, 4), torch.arange(2))
    with pytest.raises(UsageError, match="one per image"):
        Images(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.arange(3))
    with pytest.raises(UsageError, match="at least 1, not 0"):
        ImageBatches(numbered(), 0, RAW)
