"""Where the stages of a tick run, and how a tick is recorded: on streams of one GPU as a CUDA graph, or in turn as a plain function."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch

from delock.errors import StageFailed

Work = Callable[[], None]


class Streams(Protocol):
    """A lane per stage. Within `run` and `record` the lanes begin together and end together."""

    def on(self, k: int) -> AbstractContextManager[Any]:
        """What is computed inside belongs to the lane of stage k."""

    def mark(self, k: int) -> Any:
        """The present place in that lane."""

    def wait(self, k: int, mark: Any) -> None:
        """Lane k goes on once that place has been passed."""

    def run(self, work: Work) -> None:
        """Do it now."""

    def record(self, work: Work, apart: bool) -> Work:
        """Record what `work` does; returns what does it again, at the same addresses. apart: something it allocates outlives it."""

    def join(self) -> None:
        """Let everything that was asked for be done."""


class SerialStreams:
    """The lanes of a CPU: the stages take turns. A record is the function itself, so what is tested here is the memory."""

    def on(self, k: int) -> AbstractContextManager[Any]:
        """See Lanes."""
        return nullcontext()

    def mark(self, k: int) -> None:
        """See Lanes."""

    def wait(self, k: int, mark: Any) -> None:
        """See Lanes."""

    def run(self, work: Work) -> None:
        """See Lanes."""
        work()

    def record(self, work: Work, apart: bool) -> Work:
        """See Lanes: done once, as a capture does, in a capture's order."""
        work()
        return work

    def join(self) -> None:
        """See Lanes."""


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
        """See Lanes."""
        return torch.cuda.stream(self.streams[k])

    def mark(self, k: int) -> Any:
        """See Lanes: an event."""
        return self.streams[k].record_event()

    def wait(self, k: int, mark: Any) -> None:
        """See Lanes."""
        self.streams[k].wait_event(mark)

    def run(self, work: Work) -> None:
        """See Lanes."""
        torch.cuda.synchronize(self.device)
        with torch.cuda.stream(self.main):
            self._forked(work)
        torch.cuda.synchronize(self.device)

    def record(self, work: Work, apart: bool) -> Work:
        """See Lanes. Raises StageFailed where something may not be captured.

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
        """See Lanes."""
        torch.cuda.synchronize(self.device)

    def _forked(self, work: Work) -> None:
        for stream in self.streams:
            stream.wait_stream(self.main)
        work()
        for stream in self.streams:
            self.main.wait_stream(stream)


def make_streams(device: torch.device, K: int) -> Streams:
    """The lanes of K stages there."""
    return CudaStreams(device, K) if device.type == "cuda" else SerialStreams()
