"""Codecs: what they are by definition, what they cost in bytes, and that a run with them is the same in one process and in many."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import delock
from delock.cli import main
from delock.cli.rows import rows
from delock.codecs import BF16, INT8, VQ, codebook, parse, parse_error, title
from delock.codecs.bits import pack_bits, unpack_bits
from delock.codecs.codebook import Codebooks, nearest
from delock.codecs.coding import decode, encoder, predicted, sizes
from delock.config import CompareConfig, TrainConfig, build, flat, resolve
from delock.engine import run_here
from delock.errors import DelockError, UsageError
from delock.keys import key
from delock.links import Message
from delock.links.coded import CodedLink
from delock.links.mailbox import Mailbox
from delock.links.message import pack, packed_length, unpack
from delock.links.values import Library, decoded, lean
from delock.methods import BP, DGL, FDG, GPipe, Method
from delock.plan import windows
from delock.train import Job, Worker

from harness import CPU, assert_equal, in_processes, inline, jobs, same_tree

SMALL_VQ = "vq:codes=8:dim=2:every=2"


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# -- names -------------------------------------------------------------------------------------------------------------------------


def test_names() -> None:
    assert (parse("none"), parse("bf16"), parse("int8"), parse("vq")) == (None, BF16(), INT8(), VQ())
    assert parse("vq:codes=16:dim=8:every=5") == VQ(16, 8, every=5)
    assert parse("vq:groups=4") == VQ(groups=4)
    assert (VQ().bits, VQ(2).bits, VQ(3).bits, VQ(257).bits, VQ(65536).bits) == (8, 1, 2, 9, 16)
    assert (VQ(dim=8).length(32), VQ(groups=4).length(32)) == (8, 8)
    for text in ("none", "bf16", "int8", "vq", "vq:codes=16:dim=4", "vq:groups=2:every=7"):
        assert title(parse(text)) == text
    assert title(parse("vq:every=50:dim=16")) == "vq"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("vg", "no codec is called 'vg'"),
        ("BF16", "no codec is called 'BF16': use none, bf16, int8, vq"),
        ("int9", "did you mean 'int8'"),
        ("bf16:codes=3", "bf16 has no settings"),
        ("vq:code=3", "did you mean 'codes'"),
        ("vq:codes", "codes is '', but it must be a whole number"),
        ("vq:codes=many", "codes is 'many'"),
        ("vq:codes=1", "a codebook of 1 codes is out of range"),
        ("vq:codes=65537", "a codebook of 65537 codes is out of range: vq takes codes=2 to codes=65536"),
        ("vq:dim=0", "vq's dim is 0, but it must be at least 1"),
        ("vq:groups=-2", "vq's groups is -2"),
        ("vq:every=0", "vq's every is 0"),
        ("vq:dim=2:groups=2", "give one of them"),
        ("vq:dim=2:dim=3", "dim is given twice"),
    ],
)
def test_names_that_are_none(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        parse(text)
    with pytest.raises(UsageError, match="errors travel as none, bf16 or int8"):
        parse_error("vq")


# -- bits --------------------------------------------------------------------------------------------------------------------------


def test_bits_by_hand() -> None:
    """1, 2, 3, ... of three bits each, the lowest first: 1 + 2*8 + 3*64 + 4*512 + ... = 0x1f58d1."""
    packed = pack_bits(torch.tensor([1, 2, 3, 4, 5, 6, 7, 0]), 3)
    assert packed.tolist() == [0xD1, 0x58, 0x1F]
    assert pack_bits(torch.tensor([1, 0, 1, 1, 0, 0, 0, 0, 1]), 1).tolist() == [0b1101, 1]
    assert pack_bits(torch.tensor([0x0102, 0xFFFE]), 16).tolist() == [2, 1, 0xFE, 0xFF]
    assert pack_bits(torch.tensor([5, 250]), 8).tolist() == [5, 250]


@pytest.mark.parametrize("width", range(1, 17))
def test_bits_of_every_width_and_count(width: int) -> None:
    for count in (0, 1, 7, 8, 9, 100):
        values = torch.randint(2**width, (count,), generator=torch.Generator().manual_seed(count))
        whole = sum(value << width * i for i, value in enumerate(values.tolist()))
        packed = pack_bits(values, width)
        assert bytes(packed.numpy()) == whole.to_bytes(math.ceil(count * width / 8), "little")
        assert torch.equal(unpack_bits(packed, width, count).long(), values)


# -- bf16 and int8 -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bf16_rounds_as_torch_does(dtype: torch.dtype) -> None:
    x = random(4, 3, 5, 5, dtype=dtype)
    made = encoder(BF16(), 0).encode(x, True)
    assert made
    assert sizes(made) == (x.nbytes, 2 * x.numel(), 0)
    back = decode(made)
    assert back.dtype == dtype
    assert torch.equal(back, x.bfloat16().to(dtype))
    assert ((back - x).abs() <= x.abs() * 2**-8).all()


def test_int8_by_hand() -> None:
    """Channel 0 has a largest value of 127, so steps of 1; channel 1 one of 254, steps of 2 (3 lies halfway: to even); channel 2 is 0."""
    x = torch.tensor([[127.0, 3.0, 0.0], [-1.4, -254.0, 0.0], [0.6, 1.2, 0.0]])  # (B, C)
    made = encoder(INT8(), 0).encode(x, True)
    assert made
    assert made["scale"].tolist() == [1, 2, 0]
    assert made["values"].tolist() == [[127, 2, 0], [-1, -127, 0], [1, 1, 0]]
    assert decode(made).tolist() == [[127, 4, 0], [-1, -254, 0], [1, 2, 0]]


@pytest.mark.parametrize(("shape", "axis"), [((6, 5), 1), ((6, 7, 5), 2), ((6, 5, 4, 3), 1), ((2, 5, 3, 3, 3), 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_int8_is_within_half_a_step_of_its_channel(shape: tuple[int, ...], axis: int, dtype: torch.dtype) -> None:
    x = (random(*shape) * 10.0 ** random(5, seed=1).view([-1 if i == axis else 1 for i in range(len(shape))])).to(dtype)
    made = encoder(INT8(), 0).encode(x, True)
    assert made
    assert sizes(made) == (x.nbytes, x.numel() + 4 * 5, 0)
    back = decode(made)
    assert (back.dtype, back.shape) == (dtype, x.shape)
    largest = x.abs().amax([i for i in range(x.dim()) if i != axis], keepdim=True).double()
    rounding = torch.finfo(dtype).eps / 2 + 1e-6  # of the result, to the dtype
    assert ((back.double() - x.double()).abs() <= largest / 254 * (1 + 1e-5) + 1.01 * largest * rounding).all()


@pytest.mark.parametrize("codec", ["bf16", "int8", "vq:codes=4:dim=2"])
def test_layout_and_graph(codec: str) -> None:
    """A dense tensor keeps its strides, another one becomes dense; no graph comes along."""
    x = random(2, 4, 3, 5).requires_grad_()
    made = encoder(parse(codec) or BF16(), 0)
    for given in (x, x.to(memory_format=torch.channels_last), x.transpose(2, 3)):
        back = decode(made.encode(given, True) or {})
        assert (back.stride(), back.shape, back.requires_grad) == (given.stride(), given.shape, False)
    assert decode(made.encode(x[:, :, ::2], True) or {}).is_contiguous()


@pytest.mark.parametrize("codec", ["bf16", "int8", "vq:codes=4:dim=2:every=1"])
def test_what_is_no_number_does_not_become_one(codec: str) -> None:
    x = random(2, 4, 3, 3)
    x[1, 2, 0, 0] = math.nan
    assert decode(encoder(parse(codec) or BF16(), 0).encode(x, True) or {}).isnan().any()


# -- vq ----------------------------------------------------------------------------------------------------------------------------


def test_nearest_is_nearest() -> None:
    """Up to the 2^-15 of |x - m|^2 that it promises; over more than a block of codes, and with a mean far from 0."""
    for codes, d, shift in ((5, 3, 0.0), (256, 16, 0.0), (700, 4, 0.0), (256, 8, 100.0)):
        x, book = random(3000, d) + shift, random(codes, d, seed=1) + shift
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
        x = random(24, 2 * d, seed=t) + (0 if t < 3 else 6)
        drawn = torch.randperm(24, generator=torch.Generator().manual_seed(key(seed, t)))[:codes].tolist()
        books.learn(x, d)
        for g, one in enumerate(slow):
            died += one.learn(x[:, g * d : (g + 1) * d].double().tolist(), drawn)
            assert torch.allclose(books.vectors[g].double(), torch.tensor(one.book, dtype=torch.float64), rtol=1e-3, atol=1e-4), t
            assert torch.allclose(books.counts[g].double(), torch.tensor(one.counts, dtype=torch.float64), rtol=1e-4), t
    assert died > 3


def test_a_large_batch_is_learned_from_in_part() -> None:
    """64 vectors per code of 2: of 300 vectors every third, beginning one later each time."""
    x = random(300, 4)
    whole, part = Codebooks(2, 0), Codebooks(2, 0)
    for t in range(4):
        whole.learn(x, 4)
        part.learn(x[t % 3 :: 3], 4)
    same_tree(whole.state(), part.state())


def test_more_codes_than_vectors() -> None:
    """Codes are then drawn more than once; every vector is met exactly once there is a code for each."""
    x, made = random(5, 4), encoder(VQ(codes=64, dim=4, every=1), 0)
    for _ in range(20):
        payload = made.encode(x, True)
    assert payload
    assert (decode(payload) - x).norm() < 1e-2 * x.norm()


@pytest.fixture(scope="module")
def activations() -> list[Tensor]:
    """What the first layers of a small network, trained a little on the digits, send: 40 batches of (64, 16, 8, 8)."""
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
    made = encoder(parse(codec) or VQ(), 0)
    errors = [float((decode(made.encode(x, True) or {}) - x).square().sum() / x.square().sum()) for x in activations]
    first, last = sum(errors[:5]) / 5, sum(errors[-5:]) / 5
    assert last < 0.9 * first
    assert last < at_most


def test_a_message_decodes_after_the_codebook_has_moved_on(activations: list[Tensor]) -> None:
    made, library = encoder(VQ(codes=16, dim=4, every=3), 0), Library()
    kept, now = [], []
    for b, x in enumerate(activations[:10]):
        payload = made.encode(x, True)
        assert payload
        assert (payload["version"], payload["fresh"]) == (1 + b // 3, b % 3 == 0)
        _, message = unpack(pack(("h", b, 0), lean(Message(payload)))[0], CPU)
        kept.append(library.completed(message))
        now.append(decode(payload))
    assert len({id(message.values["book"]) for message in kept}) == 4  # one copy each, however many messages need it
    for message, want in zip(reversed(kept), reversed(now), strict=True):
        assert torch.equal(decoded(message).values, want)


def test_a_lost_codebook_is_noticed() -> None:
    made = encoder(VQ(codes=4, dim=2, every=2), 0)
    first, second = (Message(made.encode(random(3, 4), True)) for _ in range(2))
    assert first
    with pytest.raises(DelockError, match="encoded with codebook 1, and the last that came is 0"):
        Library().completed(lean(second))


def test_evaluation_teaches_nothing() -> None:
    made = encoder(VQ(codes=4, dim=2, every=2), 0)
    assert made.encode(random(6, 4), learn=False) is None  # there is nothing to encode it with
    made.encode(random(6, 4), learn=True)
    before = pickle.dumps(made.state())
    payload = made.encode(random(6, 4, seed=1), learn=False)
    assert payload
    assert not payload["fresh"]
    same_tree(pickle.loads(before), made.state())


def test_another_number_of_channels_is_refused() -> None:
    made = encoder(VQ(codes=4, dim=2), 0)
    made.encode(random(6, 4), learn=True)
    with pytest.raises(UsageError, match="vq has learned 4 channels, and this activation has 6"):
        made.encode(random(6, 6), learn=True)


# -- bytes -------------------------------------------------------------------------------------------------------------------------


def test_the_ratios_of_the_formula() -> None:
    """128 x 32 x 32 with d = 16 and 256 codes is 64 : 1 before codebooks; a book of 256 x 128 numbers every 50 batches beside it."""
    shape = (16, 128, 32, 32)
    payload, books = predicted(VQ(), shape, torch.float32)
    assert (16 * 128 * 32 * 32 * 4) / payload == 64
    assert books == 4 * 256 * 128 / 50
    assert predicted(VQ(16, 8), shape, torch.float32)[0] == 16 * 32 * 32 * 16 * 4 / 8
    assert predicted(BF16(), shape, torch.float32) == (16 * 128 * 32 * 32 * 2, 0)
    assert predicted(INT8(), shape, torch.float32) == (16 * 128 * 32 * 32 + 4 * 128, 0)
    assert predicted(VQ(), shape, torch.int64) == (16 * 128 * 32 * 32 * 8, 0)


@pytest.mark.parametrize("codec", [BF16(), INT8(), VQ(8, 2, every=3), VQ(1000, 4, every=3)], ids=title)
def test_the_bytes_on_the_wire_are_those_of_the_formula(codec: Any) -> None:
    """In seven messages three codebooks; beside these a header of less than 450 bytes, the labels, and gaps of less than 64."""
    box = Mailbox()
    box_end = box.end(0)
    below, above = CodedLink(box_end, 0, codec, None, seed=0), CodedLink(box.end(1), 1, codec, None, seed=0)
    x, labels = random(5, 8, 3, 3), torch.arange(5)
    wire = 0
    for b in range(7):
        below.send(1, ("h", b, 0), Message(x, labels, samples=5))
        _, message = box.queue(0, 1)[0]
        packed, _ = pack(("h", b, 0), lean(message))
        assert len(packed) == packed_length(lean(message))
        wire += len(packed)
        above.receive(0, ("h", b, 0))
    payload, books = predicted(codec, tuple(x.shape), x.dtype)
    sent = box_end.sent.to[1]
    assert (sent.messages, sent.raw, sent.encoded) == (7, 7 * x.nbytes, 7 * payload)
    assert sent.codebooks == (3 * 4 * codec.codes * 8 if isinstance(codec, VQ) else 0) == round(9 * books)
    assert sent.total == wire
    assert 0 < sent.rest < 7 * (450 + labels.nbytes + 4 * 64)


# -- runs --------------------------------------------------------------------------------------------------------------------------


def coded(work: str, K: int, method: Method, codec: str, error_codec: str = "none", **options: Any) -> list[Job]:
    made = jobs(work, K, method, **options)
    for job in made:
        job.codec, job.error_codec = parse(codec), parse_error(error_codec)
    return made


@pytest.mark.parametrize(
    ("work", "method", "codec", "error_codec"),
    [
        *(("conv", method, codec, "none") for method in (BP(), FDG(), DGL()) for codec in ("bf16", "int8", SMALL_VQ)),
        ("conv", FDG(), "bf16", "bf16"),
        ("conv", GPipe(3), SMALL_VQ, "int8"),
        ("tuple", FDG(), "vq:codes=4:dim=1:every=2", "int8"),
    ],
    ids=str,
)
def test_processes_equal_one_process(work: str, method: Method, codec: str, error_codec: str) -> None:
    there, here = (run(coded(work, 3, method, codec, error_codec)) for run in (in_processes, inline))
    assert_equal(there, here)
    for a, b in zip(there, here, strict=True):
        assert (a.report.sent_up, a.report.sent_down) == (b.report.sent_up, b.report.sent_down)
        assert (a.report.sent_up.raw > 2 * a.report.sent_up.encoded * 0.99) == (a.report.stage < 2)


def test_none_changes_nothing() -> None:
    made = coded("conv", 3, FDG(), "none")
    plain = inline(jobs("conv", 3, FDG()))
    assert_equal(inline(made), plain)
    assert plain[0].report.sent_up.raw == plain[0].report.sent_up.encoded > 0
    assert plain[2].report.sent_up.total == 0


def test_evaluation_does_not_touch_training() -> None:
    for method in (BP(), DGL()):
        with_it, without = (inline(coded("conv", 3, method, SMALL_VQ, evaluate=evaluate)) for evaluate in (True, False))
        assert with_it[-1].losses == without[-1].losses
        for a, b in zip(with_it, without, strict=True):
            same_tree(a.state, b.state)


@pytest.mark.parametrize("codec", ["bf16", "int8", "vq:codes=4:dim=2:every=1"])
def test_errors_are_those_at_the_decoded_activation(codec: str) -> None:
    """One step of backpropagation over two linear maps, against plain PyTorch with a decoded, detached activation between them."""
    torch.manual_seed(0)
    lower, upper = nn.Linear(3, 4), nn.Linear(4, 2)
    x, y = random(8, 3), torch.arange(8) % 2

    def encode(h: Tensor, place: tuple[int, int]) -> Tensor:
        return decode(encoder(parse(codec) or BF16(), key(0, "codec", *place, 0)).encode(h, True) or {})

    h = lower(x)
    leaf = encode(h, (0, 1)).requires_grad_()
    loss = cross_entropy(upper(leaf), y)
    (error,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    back = decode(encoder(INT8(), 0).encode(error, True) or {})
    want = [*torch.autograd.grad(h, lower.parameters(), back), *torch.autograd.grad(loss, upper.parameters())]
    before = [p.detach().clone() for p in (*lower.parameters(), *upper.parameters())]
    sgd = torch.optim.SGD
    delock.fit(
        [lower, upper],
        [(x, y)],
        loss=cross_entropy,
        method="bp",
        optimizer=lambda named: sgd([p for _, p in named], lr=1.0),
        steps=1,
        workers="inline",
        codec=codec,
        error_codec="int8",
    )
    for now, old, gradient in zip((*lower.parameters(), *upper.parameters()), before, want, strict=True):
        assert torch.equal(now, old - gradient)


@pytest.mark.parametrize(("method", "stop"), [(FDG(), 1), (FDG(), 3), (DGL(), 3)], ids=str)
@pytest.mark.parametrize("codec", ["int8", "vq:codes=8:dim=2:every=3"])
def test_a_resumed_run_equals_an_uninterrupted_one(method: Method, stop: int, codec: str) -> None:
    whole, first, second = (_Run(method, codec) for _ in range(3))
    for plan in whole.plans:
        run_here(plan, whole.engines)
    for plan in first.plans[:stop]:
        run_here(plan, first.engines)
    saved = pickle.dumps([engine.state() for engine in first.engines])
    for engine, state in zip(second.engines, pickle.loads(saved), strict=True):
        engine.load(state)
    for plan in second.plans[stop:]:
        run_here(plan, second.engines)
    for a, b in zip(second.engines, whole.engines, strict=True):
        same_tree(a.stage.module.state_dict(), b.stage.module.state_dict())
        same_tree(a.link.state(), b.link.state())
    assert first.losses + second.losses == whole.losses


class _Run:
    """A run over three stages in windows of two ticks, held by its parts."""

    def __init__(self, method: Method, codec: str) -> None:
        made, box = coded("conv", 3, method, codec, "int8"), Mailbox()
        self.workers = [Worker(job, box.end(job.k), CPU, lambda event: None) for job in made]
        self.engines = [worker.engine for worker in self.workers]
        self.plans = list(windows(method, 3, made[0].course, 2))

    @property
    def losses(self) -> list[float]:
        return self.workers[-1].tracker.losses


def test_a_resumed_sender_brings_its_codebook() -> None:
    """The receiver may be another process, which has none."""
    first, second = (encoder(VQ(codes=4, dim=2, every=9), 0) for _ in range(2))
    first.encode(random(6, 4), True)
    second.load(pickle.loads(pickle.dumps(first.state())))
    for learn in (False, True):
        a, b = first.encode(random(6, 4, seed=1), learn), second.encode(random(6, 4, seed=1), learn)
        assert a
        assert b
        assert (a["fresh"], b["fresh"]) == (False, not learn)
        assert torch.equal(decode(Library().completed(lean(Message(b))).values if b["fresh"] else b), decode(a))


# -- bad input ---------------------------------------------------------------------------------------------------------------------


class Round(nn.Module):
    """Floats to integers."""

    def forward(self, x: Tensor) -> Tensor:
        return x.long().clamp(0, 9)


def fit(modules: list[nn.Module], x: Tensor, **options: Any) -> None:
    delock.fit(
        modules,
        [(x, torch.zeros(len(x), dtype=torch.long))],
        loss=lambda out, y: cross_entropy(out.flatten(1), y),
        optimizer=lambda named: torch.optim.SGD([p for _, p in named], lr=0.1),
        steps=1,
        workers="inline",
        **{"method": "bp", **options},
    )


def test_bad_input_is_refused_before_the_start() -> None:
    whole: list[nn.Module] = [Round(), nn.Embedding(10, 4)]
    for codec in ("bf16", "int8", "vq"):
        with pytest.raises(UsageError, match="stage 0 sends int64, and a codec is for floating point numbers"):
            fit(whole, random(4, 3), codec=codec)
    linear = [nn.Linear(3, 12), nn.Linear(12, 2)]
    with pytest.raises(UsageError, match=r"stage 0 sends \(4, 12\): vq cannot divide 12 channels into groups of 16: .* 1, 2, 3, 4, 6, 12$"):
        fit(linear, random(4, 3), codec="vq")
    with pytest.raises(UsageError, match="vq cannot divide 12 channels into 5 groups"):
        fit(linear, random(4, 3), codec="vq:groups=5")
    with pytest.raises(UsageError, match="interlocking sends no errors down, so there is none for an error codec"):
        fit(linear, random(4, 3), method=delock.Interlocking(n_wise=1), heads=[nn.Linear(12, 2)], error_codec="bf16")
    with pytest.raises(UsageError, match="errors travel as"):
        fit(linear, random(4, 3), error_codec="vq")


def test_the_page_on_codecs() -> None:
    """Its example of ratios, and its code."""
    page = (Path(__file__).parent.parent / "docs" / "codecs.md").read_text(encoding="utf-8")
    for samples, ratio in ((128, 63.8), (1, 48.5)):
        payload, books = predicted(VQ(), (samples, 128, 32, 32), torch.float32)
        assert round(4 * samples * 128 * 32 * 32 / (payload + books), 1) == ratio
        assert f"{ratio} : 1" in page
    names = {"activation": random(6, 8, 3, 3)}
    exec(page.split("```python\n")[1].split("```")[0], names)
    assert names["again"].shape == (6, 8, 3, 3)
    assert (names["raw"], names["encoded"], names["codebook"]) == (6 * 8 * 9 * 4, 6 * 9 * 2 // 2, 16 * 8 * 4)


# -- command line ------------------------------------------------------------------------------------------------------------------

QUICK = ["--model", "mlp", "--workers", "inline", "--limit", "128", "--batch-size", "32", "--test-batch-size", "512", "--epochs", "2"]


def test_options() -> None:
    assert flat(resolve(TrainConfig()))["codec"] == "none"
    made = resolve(build(TrainConfig, {"codec": "vq:every=50:dim=8", "error_codec": "int8"}, "test"))
    assert (made.links.codec, made.links.error_codec) == ("vq:dim=8", "int8")
    found = rows(build(CompareConfig, {"methods": ["dgl:codec=vq:dim=8:codes=16:lr=0.2", "bp:error_codec=bf16"], "codec": "int8"}, "test"))
    assert [(row.config.links.codec, row.config.links.error_codec) for row in found] == [
        ("none", "none"),
        ("vq:codes=16:dim=8", "none"),
        ("int8", "bf16"),
    ]
    assert found[1].config.training.lr == 0.2
    with pytest.raises(UsageError, match="'dim' does not exist"):
        rows(build(CompareConfig, {"methods": ["dgl:dim=8"]}, "test"))


def test_train_tells_what_was_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["train", *QUICK, "--codec", "vq:codes=16:dim=8:every=4", "--error-codec", "bf16", "--out", "run"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("compression") == 3  # predicted; measured up and down
    told = json.loads(Path("run/summary.json").read_text())
    assert (told["codec"], told["error_codec"]) == ("vq:codes=16:dim=8:every=4", "bf16")
    up, down = told["stages"][0]["sent_up"], told["stages"][1]["sent_down"]
    assert (up["compression"], down["compression"]) == (8 * 4 / 0.5, 2)
    assert up["messages"] == 8 + 2 * 1
    assert up["compression_with_codebooks"] == up["raw"] / (up["encoded"] + up["codebooks"]) < 64
    assert up["total"] == up["encoded"] + up["codebooks"] + up["rest"]


def test_compare_shows_compression(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["compare", *QUICK, "--methods", "dgl,dgl:codec=int8", "--no-plain", "--out", "both"]) == 0
    lines = Path("both/compare.md").read_text().splitlines()
    assert [line.split("|")[-2].strip() for line in (lines[0], *lines[2:])] == ["compression", "-", "3.8"]


def test_a_free_running_run_replays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--method", "dgl-async", "--workers", "processes", "--codec", "vq:codes=16:dim=8:every=3", "--stages", "3", "--out", "free"]
    assert main(["train", *QUICK, *words]) == 0
    assert main(["replay", "free"]) == 0
    assert "the weights equal those of the run, to the last bit" in capsys.readouterr().out
