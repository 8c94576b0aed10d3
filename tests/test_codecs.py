"""Codecs alone: names, bits, rounding, and the bytes that they cost."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import pytest
import torch

from delock.codecs import BF16, INT8, VQ, decode, parse, parse_error, sizes, spelled
from delock.codecs.bits import bits_for, pack_bits, unpack_bits
from delock.errors import UsageError
from delock.links import Message
from delock.links.coded import CodedLink
from delock.links.mailbox import Mailbox
from delock.links.wire import pack, packed_length
from delock.records import Traffic

from messages import activation
from workloads import drawn

# -- names -------------------------------------------------------------------------------------------------------------------------


def test_names() -> None:
    assert (parse("none"), parse("bf16"), parse("int8"), parse("vq")) == (None, BF16(), INT8(), VQ())
    assert parse("vq:codes=16:dim=8:every=5") == VQ(16, 8, every=5)
    assert parse("vq:groups=4") == VQ(groups=4)
    assert [bits_for(codes) for codes in (256, 2, 3, 257, 65536)] == [8, 1, 2, 9, 16]
    assert (VQ(dim=8).group_size(32), VQ(groups=4).group_size(32)) == (8, 8)
    for text in ("none", "bf16", "int8", "vq", "vq:codes=16:dim=4", "vq:groups=2:every=7"):
        assert spelled(parse(text)) == text
    assert spelled(parse("vq:every=50:dim=16")) == "vq"
    assert (parse(None), parse(VQ(16)), parse_error(INT8())) == (None, VQ(16), INT8())
    for wrong in (VQ, 8):
        with pytest.raises(UsageError, match=r"but it must be one of delock.codecs, such as VQ\(codes=64\), or its name"):
            parse(wrong)  # type: ignore[arg-type]


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
        ("vq:dim=16:groups=2", "vq:dim=16:groups=2: dim and groups say the same thing: give one of them"),
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
    x = drawn(4, 3, 5, 5, dtype=dtype)
    made = BF16().encoder(0).encode(x, True)
    assert made
    assert sizes(made) == (x.nbytes, 2 * x.numel(), 0)
    back = decode(made)
    assert back.dtype == dtype
    assert torch.equal(back, x.bfloat16().to(dtype))
    assert ((back - x).abs() <= x.abs() * 2**-8).all()


def test_int8_by_hand() -> None:
    """Channel 0 has a largest value of 127, so steps of 1; channel 1 one of 254, steps of 2 (3 lies halfway: to even); channel 2 is 0."""
    x = torch.tensor([[127.0, 3.0, 0.0], [-1.4, -254.0, 0.0], [0.6, 1.2, 0.0]])  # (B, C)
    made = INT8().encoder(0).encode(x, True)
    assert made
    assert made["scale"].tolist() == [1, 2, 0]
    assert made["values"].tolist() == [[127, 2, 0], [-1, -127, 0], [1, 1, 0]]
    assert decode(made).tolist() == [[127, 4, 0], [-1, -254, 0], [1, 2, 0]]


@pytest.mark.parametrize(("shape", "axis"), [((6, 5), 1), ((6, 7, 5), 2), ((6, 5, 4, 3), 1), ((2, 5, 3, 3, 3), 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_int8_is_within_half_a_step_of_its_channel(shape: tuple[int, ...], axis: int, dtype: torch.dtype) -> None:
    x = (drawn(*shape) * 10.0 ** drawn(5, seed=1).view([-1 if i == axis else 1 for i in range(len(shape))])).to(dtype)
    made = INT8().encoder(0).encode(x, True)
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
    x = drawn(2, 4, 3, 5).requires_grad_()
    made = (parse(codec) or BF16()).encoder(0)
    for given in (x, x.to(memory_format=torch.channels_last), x.transpose(2, 3)):
        back = decode(made.encode(given, True) or {})
        assert (back.stride(), back.shape, back.requires_grad) == (given.stride(), given.shape, False)
    assert decode(made.encode(x[:, :, ::2], True) or {}).is_contiguous()


MOST = torch.finfo(torch.float32).max


@pytest.mark.parametrize("codec", ["bf16", "int8", "vq:codes=4:dim=2:every=1"])
@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf, MOST, -MOST])
def test_what_a_codec_cannot_hold_travels_as_it_is_and_teaches_nothing(codec: str, odd: float) -> None:
    masked = drawn(2, 4, 3, 3)
    masked[1, 2, 0, 0] = odd
    made, other = ((parse(codec) or BF16()).encoder(0) for _ in range(2))
    for seed in range(3):
        assert made.encode(masked, True) is None
        x = drawn(2, 4, 3, 3, seed=seed)
        assert torch.equal(decode(made.encode(x, True) or {}), decode(other.encode(x, True) or {}))


def test_bf16_holds_its_largest_number() -> None:
    largest = torch.tensor([torch.finfo(torch.bfloat16).max, -1.0])
    made = BF16().encode(largest, True)
    assert made
    assert torch.equal(decode(made), largest)


def test_int8_leaves_what_it_would_make_larger_as_it_is() -> None:
    """A byte per number and four per channel: of float32 two rows are worth it, of float16 five."""
    taken = [(rows, dtype) for dtype in (torch.float32, torch.float16) for rows in range(1, 7) if INT8().takes((rows, 9), dtype)]
    assert taken == [*((rows, torch.float32) for rows in range(2, 7)), (5, torch.float16), (6, torch.float16)]


# -- bytes -------------------------------------------------------------------------------------------------------------------------


def test_the_ratios_of_the_formula() -> None:
    """128 x 32 x 32 with d = 16 and 256 codes is 64 : 1 before codebooks; a book of 256 x 128 numbers every 50 batches beside it."""
    shape = (16, 128, 32, 32)
    payload, books = VQ().predicted(shape, torch.float32)
    assert (16 * 128 * 32 * 32 * 4) / payload == 64
    assert books == 4 * 256 * 128 / 50
    assert VQ(16, 8).predicted(shape, torch.float32)[0] == 16 * 32 * 32 * 16 * 4 / 8
    assert BF16().predicted(shape, torch.float32) == (16 * 128 * 32 * 32 * 2, 0)
    assert INT8().predicted(shape, torch.float32) == (16 * 128 * 32 * 32 + 4 * 128, 0)
    assert VQ().predicted(shape, torch.int64) == (16 * 128 * 32 * 32 * 8, 0)


@pytest.mark.parametrize("codec", [BF16(), INT8(), VQ(8, 2, every=3), VQ(1000, 4, every=3)], ids=spelled)
def test_the_bytes_on_the_wire_are_those_of_the_formula(codec: Any) -> None:
    """In seven messages three codebooks; beside these a header of less than 450 bytes, the labels, and gaps of less than 64."""
    box = Mailbox()
    box_end = box.end(0)
    below, above = CodedLink(box_end, 0, codec, None, seed=0), CodedLink(box.end(1), 1, codec, None, seed=0)
    x, labels = drawn(5, 8, 3, 3), torch.arange(5)
    wire = 0
    for b in range(7):
        below.send(1, activation(b), Message(x, labels, samples=5))
        _, message = box.queue(0, 1)[0]
        packed, _ = pack(activation(b), message)
        assert len(packed) == packed_length(message)
        wire += len(packed)
        above.receive(0, activation(b))
    payload, books = codec.predicted(tuple(x.shape), x.dtype)
    sent = Traffic(**asdict(box_end.sent.to[1]))
    assert (sent.messages, sent.raw, sent.encoded) == (7, 7 * x.nbytes, 7 * payload)
    assert sent.codebooks == (3 * 4 * codec.codes * 8 if isinstance(codec, VQ) else 0) == round(9 * books)
    assert sent.total == wire
    assert 0 < sent.rest < 7 * (450 + labels.nbytes + 4 * 64)
