"""Messages and tensors that the tests of links send, and threads in which they do."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from delock.links import Message, MessageKind, MessageName, Resumable
from delock.links.wire import length_of, pack, unpack

CPU = torch.device("cpu")


DTYPES = (
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.bool,
    torch.complex64,
)


def activation(batch: int, version: int = 0) -> MessageName:
    return MessageName(MessageKind.ACTIVATION, batch, version=version)


def evaluation(batch: int, version: int = 0) -> MessageName:
    return MessageName(MessageKind.EVALUATION, batch, version=version)


def error(batch: int, loss: int) -> MessageName:
    return MessageName(MessageKind.ERROR, batch, loss)


ACTIVATION = activation(3)


def trip(message: Message, name: MessageName = ACTIVATION) -> Message:
    """The message as it arrives."""
    packed, apart = pack(name, message)
    assert not apart
    assert length_of(packed) == len(packed)
    got, arrived = unpack(packed, CPU)
    assert got == name
    return arrived


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 100).to(dtype)


def tensors() -> dict[str, Tensor]:
    """Tensors that lie in memory in their own ways."""
    x = numbers(4, 3, 6, 5)
    return {
        "contiguous": x,
        "channels_last": x.to(memory_format=torch.channels_last),
        "transposed": x[0, 0].t(),
        "permuted": x.permute(3, 1, 0, 2),
        "expanded": numbers(4, 1, 5).expand(4, 3, 5),
        "a row": x[1],
        "every other row": x[::2],
        "columns": x[..., 1:3],
        "one behind the first": torch.arange(65.0)[1:],
        "a single column": numbers(6, 5)[:, 2:3],
        "one sample, channels_last": x[:1].to(memory_format=torch.channels_last),
        "a scalar inside": numbers(9)[4],
        "conjugated": numbers(3, dtype=torch.complex64).mul(1j).conj(),
        "negated": torch._neg_view(numbers(3)),
        "with a graph": x.clone().requires_grad_() * 2,
    }


def check_pull_and_push(link: Resumable, source: int, messages: int) -> None:
    """With `messages` activations under way: the pulled ones are still to come, the pushed ones come first."""
    pulled = link.pull(source, 2)
    assert [name for name, _ in pulled] == [activation(0), activation(1)]
    link.receive(source, activation(0))
    link.push(source, [(activation(98), Message(numbers(2))), (activation(99), Message(numbers(3)))])
    assert len(link.receive(source, activation(98)).values) == 2
    assert len(link.receive(source, activation(99)).values) == 3
    for b in range(1, messages):
        got = link.receive(source, activation(b))
        assert torch.equal(got.values, numbers(b + 1))
        assert b > 1 or torch.equal(got.values, pulled[1][1].values)


@contextmanager
def beside(work: Callable[[], None]) -> Iterator[None]:
    """`work` in a thread of its own, which has ended, well, afterwards."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield
    thread.join(20)
    assert not thread.is_alive(), "hangs"
    if errors:
        raise errors[0]
