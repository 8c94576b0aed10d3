"""Runs a module through torch.compile: compiled once, before training, for the shapes that will come; other inputs run uncompiled."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from delock.data.cache import cache_dir
from delock.errors import UsageError
from delock.tensors import Value, map_tensors, rows, split_bounds, tensors

CACHE = "TORCHINDUCTOR_CACHE_DIR"  # of the environment
HEADERS = ("_HEADER_DIR", "_HEADER_LOCK_DIR")  # names of torch._inductor.codecache, which not every torch has
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")  # buffers of batch norms


class Compiled(nn.Module):
    """The module `inner`, compiled; functional_call may swap parameters and buffers under it.

    Inside `compiling` it compiles for the inputs of each call. Elsewhere an input of a shape that was not compiled, such as a smaller last
    batch, runs uncompiled. Random numbers are torch's, not inductor's: dropout has the masks of the uncompiled module, unless its input has
    another layout.
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

        def run(given: Value) -> Value:
            return inner(given)  # type: ignore[no-any-return]

        run.__code__ = run.__code__.replace()  # torch keeps what it compiled, of which there may be eight, by code object
        self.run = torch.compile(run, dynamic=False, options=_options())
        self.stance: Literal["default", "eager_on_recompile"] = "eager_on_recompile"

    def forward(self, given: Value) -> Value:
        with torch.compiler.set_stance(self.stance):
            return self.run(given)

    @contextmanager
    def compiling(self, what: str) -> Iterator[None]:
        """Lets calls within the block compile. Raises UsageError, about `what`, where that fails.

        Donated buffers, which a backward may overwrite, are turned off, because several backwards may need a graph.
        """
        _keep_private()
        self.stance = "default"
        try:
            with _undonated():
                yield
        except UsageError:
            raise
        except Exception as error:
            raise UsageError(_complaint(what, error)) from error
        finally:
            self.stance = "eager_on_recompile"


def statistics(module: nn.Module) -> dict[str, Tensor]:
    """Returns the statistics that batch norms keep, by name, as new tensors over the same memory, to be swapped in for a compiled call.

    Compiled code writes them by autograd's rules, an uncompiled batch norm does not. New tensors have version counters of their own, so
    they may be written while graphs of other batches hold the old ones.
    """
    return {name: buffer.data for name, buffer in module.named_buffers() if name.rpartition(".")[2] in STATISTICS}


def _options() -> dict[str, str | int | bool | Callable[..., object]]:
    """Returns torch's options for compiling. Where its compiled headers cannot be led into the private folder, it does without them."""
    return {"fallback_random": True} if headers_dir() else {"fallback_random": True, "cpp_cache_precompile_headers": False}


def headers_dir() -> str | None:
    """Returns the folder of torch's compiled headers: one in /tmp, whatever the environment says. None if torch does not tell it."""
    from torch._inductor import codecache

    return getattr(codecache, HEADERS[0], None)


def _keep_private() -> None:
    """Lets torch keep compiled code, and run it again, in a folder into which only this user can write.

    Its own choice is a folder in /tmp, of a name that anybody can foresee and make first; it may be in the environment already, because
    torch puts it there when it loads its compiler. Raises UsageError where others can write.
    """
    given = os.environ.get(CACHE)
    if given is None or (Path(given).parent == Path(tempfile.gettempdir()) and Path(given).name.startswith("torchinductor_")):
        os.environ[CACHE] = str(cache_dir() / "compiled")
    folder = Path(os.environ[CACHE])
    if headers_dir():
        from torch._inductor import codecache

        headers = folder / "precompiled_headers"
        for name, path in zip(HEADERS, (headers, headers / "locks"), strict=True):
            setattr(codecache, name, str(path))
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except OSError as error:
        raise UsageError(f"compiled code cannot be kept in {folder}: {error}; set {CACHE} to a folder of your own") from error
    if found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise UsageError(
            f"others can write into {folder}, from which torch.compile would run code: set {CACHE} to a folder of your own, or chmod 700 it"
        )


def _undonated() -> AbstractContextManager[object]:
    """Returns a context in which compiled graphs may go backward twice. A torch without the setting raises an error where it cannot."""
    try:
        from torch._functorch import config

        undonated: AbstractContextManager[object] = config.patch(donated_buffer=False)
    except (ImportError, AttributeError):
        return nullcontext()
    return undonated


def _complaint(what: str, error: Exception) -> str:
    said = str(error).strip().split("\n")[0]
    if "InvalidCxxCompiler" in said:
        return "torch.compile needs a C++ compiler and finds none: install g++, name one in the environment as CXX, or leave compile out"
    return f"torch.compile does not take {what}: {said}; leave compile out"


def pieces(example: Value, count: int, micro_batches: int) -> list[Value]:
    """Returns inputs as the micro-batches of a batch have them, one of every shape; `example`: a batch of `count` on the meta device."""
    split = [rows(example, begin, end, count) for begin, end in split_bounds(count, micro_batches) if begin < end]
    return list({tuple(t.shape for t in tensors(piece)): piece for piece in split}.values())


def zeros(example: Value, device: torch.device) -> Value:
    """Returns inputs of the shapes and dtypes of an example."""
    made: Value = map_tensors(lambda t: torch.zeros(t.shape, dtype=t.dtype, device=device), example)
    return made
