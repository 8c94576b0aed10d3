"""Online vector quantization: its definition, its error on real activations, messages that outlive a codebook."""

from __future__ import annotations

import pickle

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from delock.codecs import VQ, codebook, decode, parse
from delock.codecs.codebook import Codebooks, nearest
from delock.errors import DelockError, UsageError
from delock.keys import key
from delock.links import Message
from delock.links.coded import ReceivedCodebooks
from delock.links.wire import pack, unpack

from harness import CPU, same_tree
from messages import activation
from workloads import drawn

# -- vq ----------------------------------------------------------------------------------------------------------------------------


def test_nearest_is_nearest() -> None:
    """Up to the 2^-15 of |x - m|^2 that it promises; over more than a block of codes, and with a mean far from 0."""
    for codes, d, shift in ((5, 3, 0.0), (256, 16, 0.0), (700, 4, 0.0), (256, 8, 100.0)):
        x, book = drawn(3000, d) + shift, drawn(codes, d, seed=1) + shift
        squares = torch.cdist(x.double(), book.double()) ** 2
        found = squares.gather(1, nearest(x, book)[:, None])[:, 0]
        room = ((x - book.mean(0)) ** 2).sum(1).double() / 2**15 + 1e-4
        assert (found <= squares.amin(1) + room).all()
        assert (found == squares.amin(1)).double().mean() > 0.99


class Slow:
    """The codebook of one group by its definition, in loops over numbers in double precision."""

    def __init__(self, codes: int, d: int) -> None:
        self.codes, self.d, self.t = codes, d, 0
        self.book: list[list[float]] = []
        self.counts, self.sums = [0.0] * codes, [[0.0] * d for _ in range(codes)]

    def learn(self, batch: list[list[float]], drawn: list[int]) -> int:
        """One batch; `drawn`: which of its vectors the codes that are dead, or have not begun, become. Returns how many were dead."""
        r, eps, died = 0.99, 1e-5, 0
        self.book = self.book or [list(batch[i]) for i in drawn]
        mine: list[list[list[float]]] = [[] for _ in range(self.codes)]
        for x in batch:
            distances = [sum((a - b) ** 2 for a, b in zip(x, e, strict=True)) for e in self.book]
            mine[distances.index(min(distances))].append(x)
        self.t += 1
        seen = 1 - r**self.t
        for j in range(self.codes):
            self.counts[j] = r * self.counts[j] + (1 - r) * len(mine[j])
            self.sums[j] = [r * s + (1 - r) * sum(x[i] for x in mine[j]) for i, s in enumerate(self.sums[j])]
        total = sum(self.counts) / seen
        for j in range(self.codes):
            count, least = self.counts[j] / seen, 0.2 * total / self.codes
            smooth = (count + eps) / (total + self.codes * eps) * total
            self.book[j] = [s / seen / smooth for s in self.sums[j]]
            if count < least:
                died += 1
                self.book[j] = list(batch[drawn[j]])
                self.counts[j] = least * seen
                self.sums[j] = [self.counts[j] * v for v in self.book[j]]
        return died


def test_codebooks_are_those_of_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two groups over forty batches whose data moves away after the first few: codes die, the sooner for a threshold of a fifth."""
    codes, d, seed, batches = 6, 3, 5, 40
    monkeypatch.setattr(codebook, "DEAD", 0.2)
    books, slow, died = Codebooks(codes, seed), [Slow(codes, d), Slow(codes, d)], 0
    for t in range(batches):
        x = drawn(24, 2 * d, seed=t) + (0 if t < 3 else 6)
        picked = torch.randperm(24, generator=torch.Generator().manual_seed(key(seed, t)))[:codes].tolist()
        books.learn(x, d)
        for g, one in enumerate(slow):
            died += one.learn(x[:, g * d : (g + 1) * d].double().tolist(), picked)
            assert torch.allclose(books.vectors[g].double(), torch.tensor(one.book, dtype=torch.float64), rtol=1e-3, atol=1e-4), t
            assert torch.allclose(books.counts[g].double(), torch.tensor(one.counts, dtype=torch.float64), rtol=1e-4), t
    assert died > 3


def test_a_large_batch_is_learned_from_in_part() -> None:
    """64 vectors per code of 2: of 300 vectors every third, beginning one later each time."""
    x = drawn(300, 4)
    whole, part = Codebooks(2, 0), Codebooks(2, 0)
    for t in range(4):
        whole.learn(x, 4)
        part.learn(x[t % 3 :: 3], 4)
    same_tree(whole.state(), part.state())


def test_more_codes_than_vectors() -> None:
    """Codes are then drawn more than once; every vector is met exactly once there is a code for each."""
    x, made = drawn(5, 4), VQ(codes=64, dim=4, every=1).encoder(0)
    for _ in range(20):
        payload = made.encode(x, True)
    assert payload
    assert (decode(payload) - x).norm() < 1e-2 * x.norm()


@pytest.fixture(scope="module")
def activations() -> list[Tensor]:
    """Activations of the first layers of a small network, trained a little on the digits: 40 batches of (64, 16, 8, 8)."""
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    x, y = torch.as_tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.as_tensor(labels)
    lower = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU())
    upper = nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(256, 10))
    optimizer = torch.optim.Adam([*lower.parameters(), *upper.parameters()], lr=0.01)
    order = [torch.randint(len(x), (64,), generator=torch.Generator().manual_seed(b)) for b in range(80)]
    for chosen in order[:40]:
        optimizer.zero_grad()
        loss = cross_entropy(upper(lower(x[chosen])), y[chosen])
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert loss < 0.5
    return [lower(x[chosen]).detach() for chosen in order[40:]]


@pytest.mark.parametrize(("codec", "at_most"), [("vq:dim=4:every=5", 0.02), ("vq:codes=64:dim=8:every=5", 0.1)])
def test_the_error_falls_on_real_activations(activations: list[Tensor], codec: str, at_most: float) -> None:
    made = (parse(codec) or VQ()).encoder(0)
    errors = [float((decode(made.encode(x, True) or {}) - x).square().sum() / x.square().sum()) for x in activations]
    first, last = sum(errors[:5]) / 5, sum(errors[-5:]) / 5
    assert last < 0.9 * first
    assert last < at_most


def test_a_message_decodes_after_the_codebook_has_moved_on(activations: list[Tensor]) -> None:
    made, received = VQ(codes=16, dim=4, every=3).encoder(0), ReceivedCodebooks()
    kept, now = [], []
    for b, x in enumerate(activations[:10]):
        payload = made.encode(x, True)
        assert payload
        assert (payload["version"], payload["fresh"]) == (1 + b // 3, b % 3 == 0)
        _, message = unpack(pack(activation(b), Message(payload if payload["fresh"] else {**payload, "book": None}))[0], CPU)
        kept.append(received.with_codebooks(0, message))
        now.append(decode(payload))
    assert len({id(message.values["book"]) for message in kept}) == 4  # one copy each, however many messages need it
    for message, want in zip(reversed(kept), reversed(now), strict=True):
        assert torch.equal(decode(message.values), want)


def test_a_lost_codebook_is_noticed() -> None:
    made = VQ(codes=4, dim=2, every=2).encoder(0)
    first, second = (made.encode(drawn(3, 4), True) for _ in range(2))
    assert first
    assert second
    with pytest.raises(DelockError, match="encoded with codebook 1, and the last that came is 0"):
        ReceivedCodebooks().complete(0, 0, {**second, "book": None})


def test_evaluation_teaches_nothing() -> None:
    made = VQ(codes=4, dim=2, every=2).encoder(0)
    assert made.encode(drawn(6, 4), learn=False) is None  # there is nothing to encode it with
    made.encode(drawn(6, 4), learn=True)
    before = pickle.dumps(made.state())
    payload = made.encode(drawn(6, 4, seed=1), learn=False)
    assert payload
    assert not payload["fresh"]
    same_tree(pickle.loads(before), made.state())


def test_another_number_of_channels_is_refused() -> None:
    made = VQ(codes=4, dim=2).encoder(0)
    made.encode(drawn(6, 4), learn=True)
    with pytest.raises(UsageError, match="vq has learned 4 channels, and this activation has 6"):
        made.encode(drawn(6, 6), learn=True)
