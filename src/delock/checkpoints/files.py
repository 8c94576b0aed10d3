"""Writes tensors in the safetensors format: a length, a header in JSON, then the values, one tensor behind the other.

The library for it would do, but for two things: the bytes are checked here as they are written, without reading them back, and a tensor
that must be moved or laid out anew is so alone, not with all others.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from delock.errors import UsageError

CHUNK = 1 << 20  # bytes at a time: what was read for the sum is still in the cache when it is written

NAMES: Mapping[torch.dtype, str] = MappingProxyType(
    {
        torch.float64: "F64",
        torch.float32: "F32",
        torch.float16: "F16",
        torch.bfloat16: "BF16",
        torch.complex64: "C64",
        torch.float8_e4m3fn: "F8_E4M3",
        torch.float8_e5m2: "F8_E5M2",
        torch.int64: "I64",
        torch.int32: "I32",
        torch.int16: "I16",
        torch.int8: "I8",
        torch.uint64: "U64",
        torch.uint32: "U32",
        torch.uint16: "U16",
        torch.uint8: "U8",
        torch.bool: "BOOL",
    }
)


def save(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[int, int]:
    """Writes tensors by name, and brings them to the disk. Returns the bytes of the file and their CRC32."""
    size = crc = 0
    with path.open("wb", buffering=0) as file:
        for chunk in _chunks(tensors, metadata):
            crc, size = zlib.crc32(chunk, crc), size + len(chunk)
            while chunk:
                chunk = chunk[file.write(chunk) :]
        os.fsync(file.fileno())
    return size, crc


def _chunks(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[memoryview]:
    order = sorted(tensors, key=lambda name: -tensors[name].element_size())  # so that each is aligned
    header = json.dumps(_header({name: tensors[name] for name in order}, metadata), separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    yield memoryview(len(header).to_bytes(8, "little") + header)
    for name in order:
        values = tensors[name].detach().cpu().resolve_conj().contiguous().flatten().view(torch.uint8).numpy().data
        yield from (values[at : at + CHUNK] for at in range(0, len(values), CHUNK))


def _header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, object]:
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in NAMES:
            raise UsageError(
                f"tensor {name} is {str(tensor.dtype).removeprefix('torch.')}, which a checkpoint cannot keep: use another dtype"
            )
        end = at + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    return header
