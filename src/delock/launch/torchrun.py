"""Runs on the ranks that torchrun started: each runs the same program and has all results; rank 0 receives the events."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist
from torch.distributed import PrefixStore  # type: ignore[attr-defined]

from delock.errors import UsageError
from delock.launch.addresses import refuse_loopback
from delock.launch.cause import cause
from delock.launch.collective import gather
from delock.launch.cores import settle
from delock.launch.failure import Ended, raised
from delock.launch.heartbeats import BEAT, Heartbeats
from delock.launch.notices import NoticesInStore
from delock.launch.post import OnEvent, Post, Telling
from delock.launch.progress import Progress
from delock.launch.rank import TIMEOUT, Rank, backend_for, device_of
from delock.launch.rendezvous import meet, store_name
from delock.launch.roll import Verdict
from delock.launch.sigterm import Sigterm
from delock.launch.variables import rank_of_torchrun

P = TypeVar("P")
R = TypeVar("R")
_ROUSED = 5.0  # seconds for the main thread of rank 0 to leave its op
SLACK = 5.0  # seconds for a network between hosts: after a cut of 3 s, TCP may try again after 3 s more


def run_torchrun(
    target: Callable[[Rank, P], R],
    payload_of: Callable[[int], P],
    telling: Telling,
    *,
    device: str = "cpu",
    backend: str | None = None,
    threads: int = 1,
    patience: float = 60.0,
    timeout: float = TIMEOUT,
    on_event: OnEvent | None = None,
    waiting: Callable[[], None] = lambda: None,
) -> list[R]:
    """Runs target(rank, payload_of(rank)) on this rank of torchrun, and returns the results of all ranks in rank order, on every rank.

    on_event: called as on_event(rank, event) on rank 0 only, for the events of all ranks, from one thread at a time.
    device: "cuda" is the GPU numbered LOCAL_RANK. telling: the form in which results and events go from rank to rank. waiting: is called
    now and then before the ranks have met, and may raise.

    If a target raises, its rank prints stage, op and traceback to stderr and ends with Ended, a SystemExit, of code 2 for a UsageError,
    else 1; torchrun then stops the others. What `on_event` raises ends the run, and is raised on rank 0 as it is. If a rank is at one op
    for `patience` seconds, or all ranks wait for each other that long (0: never), the first rank that sees it prints the culprit and its
    stack, and exits with 1; a target may set another patience by `Rank.be_patient`. A rank that loses the store or its peers ends by
    itself, and names the stage at fault; between several hosts SLACK is added to the patience. Raises UsageError for a host that the others
    could not reach, for variables of torchrun that make no sense, and beside a process group of the program's own.
    """
    place = rank_of_torchrun()
    rank, world, local_world = place.rank, place.world, place.local_world
    if dist.is_initialized():
        raise UsageError(
            "there is a process group, and under torchrun delock makes its own: call it before init_process_group, or destroy yours first; "
            "behind a run that has failed, start the program again"
        )
    group, limit = backend_for(device, backend, local_world), timedelta(seconds=timeout)
    settle(threads, None)
    progress, where = Progress(), device_of(device, place.local_rank)
    store = meet(rank, world, limit, waiting)
    store.set_timeout(limit)
    # Every run of a program needs keys of its own, or a group would read the addresses of the run before. All ranks count alike.
    space = f"delock/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{store.add(f'delock/runs/{rank}', 1)}"

    def deaf() -> None:  # is called on another thread than the main one, whose work it ends
        _note_end(watch)
        sigterm.rouse("what hears the events of the run has failed")

    post = Post(rank, world, space, limit, telling, on_event, deaf)
    slack = SLACK if world > local_world else 0.0

    def leave(culprit: int, message: str) -> None:
        _leave(sigterm, watch, rank, message)

    watch = Heartbeats(rank, world, post.store, progress, patience and patience + slack, leave, store_name())
    sigterm = Sigterm(lambda: _judge(rank, watch))

    def emit(event: object) -> None:
        with progress.aside():
            post.emit(event)

    def be_patient(seconds: float) -> None:
        watch.be_patient(seconds and seconds + slack)

    with ExitStack() as last, closing(watch), sigterm:
        last.callback(post.abandon)
        try:
            refuse_loopback(world, local_world)  # with the store at hand, so that the ranks on other hosts hear of it
            dist.init_process_group(group, store=PrefixStore(space, store), rank=rank, world_size=world, timeout=limit)
            result = target(
                Rank(rank, world, where, emit, progress, be_patient, meet=_meet, notices=NoticesInStore(post.store, progress)),
                payload_of(rank),
            )
            watch.done()
            results: list[tuple[R, int]] = [telling.unpack(one) for one in gather(telling.pack((result, post.emitted)))]
            if rank == 0:
                post.close([emitted for _, emitted in results])
            dist.barrier()  # rank 0 may host the store: the others end after it has heard them
        except BaseException as error:
            if post.error is not None or not isinstance(error, Exception):  # or Ctrl-C
                _note_end(watch)
                if post.error is not None:
                    raise post.error from None
                raise
            end = _ended(rank, error, progress, watch)
            watch.close()
            if slack:
                time.sleep(2 * BEAT)  # the other hosts read the verdict before the store may go with this rank
            raise end from error
    dist.destroy_process_group()
    return [result for result, _ in results]


def _meet() -> None:
    dist.barrier()


def _ended(rank: int, error: BaseException, progress: Progress, watch: Heartbeats) -> Ended:
    """Prints the failure, unless it is the echo of another rank's, and returns the end of this rank."""
    at = progress.read()
    failure = raised(rank, error, at)
    verdict = cause(failure, error, at, watch)
    if failure.echo and verdict.message != failure.headline:
        _say(_line(rank, verdict, watch))
    elif verdict.finder == rank or not failure.usage:
        _say(f"error: {failure.error()}")
    return Ended(2 if failure.usage else 1, verdict.message)


def _judge(rank: int, watch: Heartbeats) -> str:
    """Returns the reason of a SIGTERM, and prints it, if another stage is at fault; else ""."""
    verdict = watch.judge()
    if verdict is None:
        return ""
    _say(_line(rank, verdict, watch))
    return verdict.message


def _note_end(watch: Heartbeats) -> None:
    """Lets the other ranks know that this one ends by its program's will."""
    with suppress(RuntimeError):  # the store is gone
        watch.roll.leave()


def _leave(sigterm: Sigterm, watch: Heartbeats, rank: int, message: str) -> None:
    """Ends this rank from a thread of the watch; rank 0 by its main thread, if that can be roused, because its caller may keep records."""
    _say(f"error: {message}")
    if rank == 0:
        sigterm.rouse(message.partition("\n")[0])
        if watch.ends_within(_ROUSED):
            return
    sys.stdout.flush()
    os._exit(1)


def _line(rank: int, verdict: Verdict, watch: Heartbeats) -> str:
    if verdict.finder == rank:
        return f"error: {verdict.message}"
    return f"stage {rank} stops {watch.place(rank)}, because {verdict.message}"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
