"""Objects between processes: pickled without the memory of their tensors, which follows in chunks, so that nobody holds it twice."""

from __future__ import annotations

import ctypes
import io
import mmap
import os
import pickle
import tempfile
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import IO, Any

import torch
from torch import UntypedStorage
from torch.storage import TypedStorage

from delock.launch.by_value import ByValue
from delock.launch.parametrized import reduced

CHUNK = 4 << 20  # bytes of one message
_ALIGNED = 64  # bytes; torch's own tensors begin at such addresses


class Parcel:
    """Holds an object as bytes, and the memory of its tensors where it is: their own.

    Tensors of other devices are pickled whole. torch.multiprocessing's reductions are not used: they would share the tensors' memory
    between processes, and tie it to files and the sender.
    """

    def __init__(self, value: object, *, returns: bool = False) -> None:
        """Raises whatever an object's own reduction raises.

        returns: it goes where the program's own functions and classes have come from, so these are names; and tensors over the same memory
        arrive over the same memory.
        """
        into = io.BytesIO()
        pickler = _Returning(into) if returns else Sending(into)
        pickler.dump(value)
        self.pickled, self.storages = into.getvalue(), pickler.memory.storages
        self.made = pickler.made if isinstance(pickler, Sending) else []

    @property
    def size(self) -> int:
        """Returns the bytes that travel."""
        return len(self.pickled) + sum(one.nbytes() for one in self.storages)

    def send(self, send: Callable[[Any], None]) -> None:
        """Sends it as messages: the sizes, then the memory in chunks, then the object."""
        send(pickle.dumps([one.nbytes() for one in self.storages]))
        for one in self.storages:
            for chunk in _chunks(one):
                send(chunk)
        send(self.pickled)


def receive(down: Connection) -> tuple[bytes, list[UntypedStorage]]:
    """Returns a pickled object and the memory of its tensors."""
    storages = [_storage(size) for size in pickle.loads(down.recv_bytes())]
    for one in storages:
        for chunk in _chunks(one):
            down.recv_bytes_into(chunk)
    return down.recv_bytes(), storages


class Arriving:
    """Keeps what arrives in a file without a name, in memory where the system has such files: until it is asked for, it takes no memory
    of this process.
    """

    def __init__(self, sizes: bytes) -> None:
        """sizes: the first message."""
        self.sizes: list[int] = pickle.loads(sizes)
        self.left = sum(self.sizes)
        self.pickled: bytes | None = None
        self.file = _file() if self.left else None
        self.todo = [size for size in self.sizes if size]
        self.begun = 0  # bytes of the storage that arrives

    def take(self, message: bytes) -> bool:
        """Takes the next message; returns True for the last."""
        if not self.left:
            self.pickled = message
            return True
        assert self.file
        self.file.write(message)
        self.left -= len(message)
        self.begun += len(message)
        if self.begun == self.todo[0]:
            self.file.write(bytes(-self.todo.pop(0) % _ALIGNED))
            self.begun = 0
        return False

    def close(self) -> None:
        """Gives up what has arrived."""
        if self.file:
            self.file.close()

    def open(self) -> Any:
        """Returns the object; its tensors lie in the file, and are read when they are used."""
        assert self.pickled is not None
        if self.file is None:
            return Unpickler(io.BytesIO(self.pickled), [_storage(0) for _ in self.sizes]).load()
        with self.file:
            self.file.flush()
            mapped = mmap.mmap(self.file.fileno(), 0)
        return Unpickler(io.BytesIO(self.pickled), list(_parts(mapped, self.sizes))).load()


class _Memory:
    """Collects the memory of tensors apart from the pickle."""

    def __init__(self, shared: bool) -> None:
        self.shared, self.numbers = shared, dict[int, int]()
        self.storages: list[UntypedStorage] = []

    def number(self, obj: Any) -> tuple[int, torch.dtype | None] | None:
        """Returns the number of a storage, and the dtype that it is seen with; None for all else."""
        if not isinstance(obj, TypedStorage | UntypedStorage):
            return None
        storage = obj._untyped_storage if isinstance(obj, TypedStorage) else obj
        if storage.device.type != "cpu":
            return None
        number = self.numbers.setdefault(storage._cdata, len(self.storages)) if self.shared else len(self.storages)
        if number == len(self.storages):
            self.storages.append(storage)
        return number, obj.dtype if isinstance(obj, TypedStorage) else None


class Sending(ByValue):
    """Pickles for a rank."""

    def __init__(self, into: Any) -> None:
        super().__init__(into)
        self.memory = _Memory(shared=False)

    def persistent_id(self, obj: Any) -> tuple[int, torch.dtype | None] | None:
        """Returns the number of a storage."""
        return self.memory.number(obj)


class _Returning(pickle.Pickler):
    """Pickles for the program that has sent a rank its target."""

    def __init__(self, into: io.BytesIO) -> None:
        super().__init__(into, protocol=pickle.HIGHEST_PROTOCOL)
        self.memory = _Memory(shared=True)

    def reducer_override(self, obj: Any) -> Any:
        """Returns how an object is pickled that cannot say it itself."""
        return reduced(obj)

    def persistent_id(self, obj: Any) -> tuple[int, torch.dtype | None] | None:
        """Returns the number of a storage."""
        return self.memory.number(obj)


class Unpickler(pickle.Unpickler):
    """Loads what a Parcel has pickled."""

    def __init__(self, pickled: io.BytesIO, storages: Sequence[UntypedStorage]) -> None:
        super().__init__(pickled)
        self.storages = storages

    def persistent_load(self, pid: Any) -> Any:
        """Returns a storage by its number."""
        number, dtype = pid
        storage = self.storages[number]
        return storage if dtype is None else TypedStorage(wrap_storage=storage, dtype=dtype, _internal=True)  # type: ignore[no-untyped-call]


def _storage(size: int) -> UntypedStorage:
    return UntypedStorage(size)  # type: ignore[no-untyped-call]


def _chunks(storage: UntypedStorage) -> Iterator[memoryview]:
    """Yields the memory of a storage, piece by piece."""
    size = storage.nbytes()
    if size:
        memory = memoryview((ctypes.c_char * size).from_address(storage.data_ptr())).cast("B")
        yield from (memory[at : at + CHUNK] for at in range(0, size, CHUNK))


def _parts(mapped: mmap.mmap, sizes: Sequence[int]) -> Iterator[UntypedStorage]:
    at = 0
    for size in sizes:
        yield torch.frombuffer(mapped, dtype=torch.uint8, count=size, offset=at).untyped_storage() if size else _storage(0)
        at += size + -size % _ALIGNED


def _file() -> IO[bytes]:
    return os.fdopen(os.memfd_create("delock-result"), "w+b") if hasattr(os, "memfd_create") else tempfile.TemporaryFile()
