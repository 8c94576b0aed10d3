"""Runs and records the stages of a tick: on streams of one GPU as a CUDA graph, or one after the other as a plain function."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch

from delock.errors import StageFailed

Work = Callable[[], None]


class Streams(Protocol):
    """A stream per stage. Within `run` and `record` the streams begin together and end together."""

    def on(self, k: int) -> AbstractContextManager[Any]:
        """Puts what is computed within the block on the stream of stage k."""

    def mark(self, k: int) -> Any:
        """Returns the present place in the stream of stage k."""

    def wait(self, k: int, mark: Any) -> None:
        """Lets the stream of stage k go on once that place has been passed."""

    def run(self, work: Work) -> None:
        """Does the work now."""

    def record(self, work: Work, apart: bool) -> Work:
        """Records the work, and returns a function that does it again at the same addresses; apart: something it allocates outlives it."""

    def join(self) -> None:
        """Waits until all work is done."""


class SerialStreams:
    """The stages of a CPU, one after the other. A record is the function itself, so that tests see the memory at work."""

    def on(self, k: int) -> AbstractContextManager[Any]:
        """Changes nothing."""
        return nullcontext()

    def mark(self, k: int) -> None:
        """Marks nothing: all that was asked for is done."""

    def wait(self, k: int, mark: Any) -> None:
        """Has nothing to wait for."""

    def run(self, work: Work) -> None:
        """Does the work."""
        work()

    def record(self, work: Work, apart: bool) -> Work:
        """Does the work once, in the order of a capture, and returns the work itself."""
        work()
        return work

    def join(self) -> None:
        """Has nothing to wait for."""


class CudaStreams:
    """A stream per stage on one GPU, forked from and joined to a main stream; a record is a CUDA graph of it all.

    A stage's ops are always issued on its own stream: autograd runs a backward on the stream of its forward, and a stream that does
    not take part in a capture must not be touched by it. No tensor that the allocator may free passes from one stream to another.
    """

    def __init__(self, device: torch.device, K: int) -> None:
        gc.collect()  # a graph left over from elsewhere would tie the weights' gradients to the stream that it was made on
        self.device = device
        self.main, *self.streams = (torch.cuda.Stream(device) for _ in range(K + 1))  # type: ignore[no-untyped-call]
        self.pool = torch.cuda.graph_pool_handle()

    def on(self, k: int) -> AbstractContextManager[Any]:
        """Makes the stream of stage k the current one."""
        return torch.cuda.stream(self.streams[k])

    def mark(self, k: int) -> Any:
        """Returns an event of the stream of stage k."""
        return self.streams[k].record_event()

    def wait(self, k: int, mark: Any) -> None:
        """Lets the stream of stage k wait for an event."""
        self.streams[k].wait_event(mark)

    def run(self, work: Work) -> None:
        """Does the work with the device to itself."""
        torch.cuda.synchronize(self.device)
        with torch.cuda.stream(self.main):
            self._forked(work)
        torch.cuda.synchronize(self.device)

    def record(self, work: Work, apart: bool) -> Work:
        """Captures the work as a CUDA graph. Raises StageFailed where something may not be captured.

        Graphs of one memory pool may only be replayed in the order of their capture as long as nothing outlives a replay; what does (the
        activations that a backward in another graph will read) lies in a pool that no other graph allocates from. "thread_local": other
        threads, such as a data loader's that pins memory, may use the GPU meanwhile.
        """
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.device(self.device), torch.cuda.graph(graph, None if apart else self.pool, self.main, "thread_local"):
                self._forked(work)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # the end of a capture says only that it failed; what stands behind it says why
            raise StageFailed(
                f"a tick could not be captured as a CUDA graph: {error.__context__ or error}\nNetwork and loss may not ask for a "
                "number that the GPU has computed (.item(), indexing by a mask, BatchNorm with momentum=None)"
            ) from error
        return graph.replay

    def join(self) -> None:
        """Waits for the device."""
        torch.cuda.synchronize(self.device)

    def _forked(self, work: Work) -> None:
        for stream in self.streams:
            stream.wait_stream(self.main)
        work()
        for stream in self.streams:
            self.main.wait_stream(stream)


def make_streams(device: torch.device, K: int) -> Streams:
    """Returns the streams of K stages on a device."""
    return CudaStreams(device, K) if device.type == "cuda" else SerialStreams()
