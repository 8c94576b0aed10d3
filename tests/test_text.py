"""Text: tokens and back, windows of it, the embedded text, tiny-shakespeare, and every text that cannot be used."""

import os
import pickle
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from delock.data import Loader
from delock.data.alphabet import Alphabet
from delock.data.text import RandomWindows, load_text
from delock.errors import UsageError

LATIN = "Grüße aus Köln,\r\n„100 €“ 🙂\n"


@pytest.fixture
def path(tmp_path):
    """A text of 1,000 random letters."""
    file = tmp_path / "letters.txt"
    file.write_text("".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=1000)))
    return file


def same(a, b):
    return all(torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(a, b, strict=True))


def small(path, **more):
    return load_text(path, **{"context": 10, "batch_size": 4, **more})


# tokens


@pytest.mark.parametrize("level", ["char", "byte"])
def test_tokens_become_the_text_again(tmp_path, level):
    (tmp_path / "a.txt").write_bytes(3 * LATIN.encode())
    data = load_text(tmp_path / "a.txt", level=level, context=2, batch_size=1)
    for text in (LATIN, LATIN[::-1], ""):
        tokens = data.encode(text)
        assert (tokens.dtype, tokens.dim()) == (torch.int64, 1)
        assert data.decode(tokens) == text
    assert data.vocabulary == (256 if level == "byte" else len(set(LATIN)))
    assert data.alphabet == Alphabet(None if level == "byte" else "".join(sorted(set(LATIN))))


def test_tokens_are_numbered_by_code_point():
    assert Alphabet("\nab€").encode("b€\na").tolist() == [2, 3, 0, 1]
    assert Alphabet("\nab€").decode([2, 3, 0, 1]) == "b€\na"
    assert Alphabet(None).encode("a€").tolist() == [97, 0xE2, 0x82, 0xAC]
    assert Alphabet(None).decode([97, 0xE2, 0x82, 98]) == "a\ufffdb"  # a model may stop half way through a character


@pytest.mark.parametrize("strange", ["z", "\x00", "🙂", "\ud800"])
def test_a_character_without_a_token_is_refused(strange):
    with pytest.raises(UsageError, match="does not occur in the training text"):
        Alphabet("abc").encode(f"a{strange}b")


@pytest.mark.parametrize("characters", ["", "ba", "aab"])
def test_an_alphabet_is_sorted_and_has_everything_once(characters):
    with pytest.raises(UsageError, match="sorted"):
        Alphabet(characters)


# windows


def test_targets_are_the_tokens_that_follow(path):
    data, text = small(path), path.read_text()
    assert isinstance(data.train, Loader)
    assert isinstance(data.test, Loader)
    for loader, part in ((data.train, text[:900]), (data.test, text[900:])):
        for inputs, targets in loader.epoch(0):
            assert inputs.dtype == targets.dtype == torch.int64
            assert inputs.is_contiguous()
            assert targets.is_contiguous()
            for x, y in zip(inputs, targets, strict=True):
                assert data.decode(x) + data.decode(y[-1:]) in part
                assert torch.equal(x[1:], y[:-1])


def test_training_windows_follow_from_seed_epoch_and_sample(path):
    loader = small(path).train
    assert same(loader.epoch(3), list(loader.epoch(3)))
    assert same(loader.epoch(3), pickle.loads(pickle.dumps(loader)).epoch(3))
    assert not same(loader.epoch(3), loader.epoch(4))
    assert not same(loader.epoch(3), small(path, seed=1).train.epoch(3))
    rows = torch.cat([x for x, _ in loader.epoch(3)])
    halves = torch.cat([x for x, _ in small(path, batch_size=2).train.epoch(3)])
    assert torch.equal(rows[:40], halves[:40])  # sample i is the same in batches of another size


def test_training_windows_are_pinned_and_reach_both_ends():
    loader = RandomWindows(np.arange(900, dtype=np.uint16), context=897, batch_size=1, batches=20, seed=0)
    starts = [int(x[0, 0]) for x, _ in loader.epoch(0)]  # three places to begin at
    assert starts[:10] == [0, 2, 0, 2, 2, 2, 0, 1, 0, 0]  # runs are to be repeatable with later versions
    assert set(starts) == {0, 1, 2}


@pytest.mark.parametrize(("batch_size", "batches"), [(4, 22), (7, 13), (1000, 1)])
def test_an_epoch_is_about_one_pass_in_full_batches(path, batch_size, batches):
    loader = small(path, batch_size=batch_size).train
    assert loader.sizes() == [len(x) for x, _ in loader.epoch(0)] == [batch_size] * batches
    assert len(loader) == batches
    assert len(small(path, batches_per_epoch=5).train) == 5


@pytest.mark.parametrize(("more", "sizes"), [({}, [4, 4, 1]), ({"context": 11}, [4, 4, 1]), ({"test_batch_size": 9}, [9])])
def test_validation_reads_everything_once(path, more, sizes):
    """100 tokens: 9 windows of 10 or of 11, in order; the last window has 9, or none, to itself and is left out."""
    data = small(path, **more)
    assert data.test.sizes() == [len(x) for x, _ in data.test.epoch(0)] == sizes
    assert len(data.test) == len(sizes)
    inputs, targets = (torch.cat(parts).flatten() for parts in zip(*data.test.epoch(0), strict=True))
    part = path.read_text()[900:]
    assert data.decode(inputs) == part[: len(inputs)]
    assert data.decode(targets) == part[1 : 1 + len(inputs)]
    assert 100 - 1 - len(inputs) < data.context
    assert same(data.test.epoch(0), data.test.epoch(1))
    assert same(data.test.epoch(0), pickle.loads(pickle.dumps(data.test)).epoch(0))


def test_the_split_is_the_callers(path):
    data = small(path, test_fraction=0.25)
    assert (len(data.train.tokens), len(data.test.tokens)) == (750, 250)


# texts


def test_the_embedded_text():
    data = load_text(context=128, batch_size=32)
    assert data.name.startswith("pydoc_data.topics of Python 3.")
    assert 50 < data.vocabulary < 300
    assert len(data.train) > 50
    everything = torch.from_numpy(data.train.tokens[:2000].astype("int64"))
    assert "assert" in data.decode(everything)  # the first topic
    assert same(data.test.epoch(0), load_text(context=128, batch_size=32, seed=9).test.epoch(0))
    by_bytes = load_text(level="byte", context=128, batch_size=32)
    assert by_bytes.vocabulary == 256
    assert len(by_bytes.train.tokens) >= len(data.train.tokens)


def test_a_python_without_the_embedded_text(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(UsageError, match="without pydoc_data"):
        load_text(context=8, batch_size=1)


def test_tiny_shakespeare():
    if "DELOCK_DATA" not in os.environ:
        pytest.skip("DELOCK_DATA is not set")
    path = Path(os.environ["DELOCK_DATA"]) / "tinyshakespeare.txt"
    if not path.is_file():
        pytest.skip("DELOCK_DATA holds no tinyshakespeare.txt")
    data = load_text(path, context=128, batch_size=64)
    assert (data.vocabulary, data.name) == (65, "tinyshakespeare.txt")
    assert (len(data.train.tokens), len(data.test.tokens)) == (1_003_854, 111_540)
    assert data.train.tokens.dtype == "uint8"
    assert (len(data.train), sum(data.test.sizes())) == (123, 871)
    assert data.decode(next(data.test.epoch(0))[0][0]).startswith("?\n\nGREMIO:\nGood morrow")


# what cannot be used


@pytest.mark.parametrize(
    ("content", "more", "complaint"),
    [
        (b"", {}, "is empty"),
        (b"caf\xe9 au lait", {}, r"not UTF-8: its byte 0xe9 at offset 3 .*\(level byte\)"),
        (b"fifty letters, of which the last five are not read", {}, "a context of 10 is too long .* a context of at most 4"),
        (b"ab", {}, "Use a longer text"),
        (b"abc" * 99, {"context": 0}, "context must be at least 1"),
        (b"abc" * 99, {"batch_size": 0}, "batch size must be at least 1"),
        (b"abc" * 99, {"batches_per_epoch": 0}, "batches per epoch must be at least 1"),
        (b"abc" * 99, {"test_batch_size": 0}, "test batch size must be at least 1"),
        (b"abc" * 99, {"test_fraction": 1.0}, "test fraction must lie between 0 and 1"),
        (b"abc" * 99, {"level": "word"}, "unknown level 'word'"),
    ],
)
def test_a_text_that_cannot_be_used(tmp_path, content, more, complaint):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UsageError, match=complaint):
        small(tmp_path / "a.txt", **more)


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        small(tmp_path / "a.txt")
    with pytest.raises(UsageError, match="cannot be read"):
        small(tmp_path)


def test_bytes_need_no_utf8(tmp_path):
    (tmp_path / "a.txt").write_bytes(bytes(range(256)) * 2)
    data = small(tmp_path / "a.txt", level="byte")
    assert data.train.tokens[:256].tolist() == list(range(256))
