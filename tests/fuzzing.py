"""Inputs of every kind that a command reads, valid and invalid ones, drawn from a seed. Each knows which it is."""

from __future__ import annotations

import io
import json
import random
import re
import shutil
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import numpy as np
from PIL import Image

from delock.cli.config import TrainConfig
from delock.cli.config.flat import table
from delock.cli.seals import sealed

TINY = ["--model", "mlp", "--limit", "64", "--batch-size", "32", "--batches", "2", "--test-batch-size", "512", "--workers", "inline"]
TEXT = ["--data", "text", "--depth", "1", "--width", "8", "--attention-heads", "1", "--context", "8", "--batch-size", "2", "--batches", "2"]


@dataclass(frozen=True)
class Input:
    """The words of a command, and if it is valid."""

    words: list[str]
    valid: bool
    what: str = ""  # for a failure's message


# ---- options -------------------------------------------------------------------------------------------------------------------------

OPTIONS = table(TrainConfig)
NOT_DRAWN = {"config", "out", "overwrite", "resume", "compile", "captured", "device", "tensorboard", "download", "trace", "workers"}
VALID: dict[str, list[str]] = {
    "seed": ["0", "7", "9223372036854775807"],
    "lr": ["0.1", "1e-3"],
    "momentum": ["0", "0.5"],
    "weight_decay": ["0", "0.01"],
    "schedule": ["cosine", "constant"],
    "warmup": ["0", "2"],
    "epochs": [],
    "stages": ["1", "2", "3"],
    "cuts": ["1", "2", "1 3"],
    "dropout": ["0", "0.5"],
    "eval_every": ["1", "2", "100"],
    "clip": ["0.5", "100"],
    "threads": ["1", "2"],
    "balance": ["counted", "measured"],
    "link": ["auto", "gloo", "shared"],
    "patience": ["0", "30"],
    "amp": ["no", "bf16"],
    "layout": ["default", "channels-last", "auto"],
    "chunks": ["1", "2"],
    "codec": ["none", "bf16", "int8", "vq:codes=4:dim=4:every=3"],
    "error_codec": ["none", "bf16", "int8"],
    "slow": ["0:0.5", "random:0.5"],
    "log_every": ["1", "1000"],
    "batch_size": ["1", "16"],
    "test_batch_size": ["1", "64"],
    "limit": ["32", "1000"],
    "checkpoint_every": ["1", "2m", "90s"],
    "checkpoint_keep": ["1", "9"],
    "grace": ["0", "5"],
    "checkpoint_best": ["min:loss", "max:accuracy"],
    "max_restarts": ["0", "2"],
    "optimizer": ["sgd", "adamw", "nadamw", "muon"],
    "correct": ["feedback", "spike"],
    "beta1": [],
}
METHODS = [
    *("bp", "bp --accumulate 2", "gpipe --micro-batches 2", "1f1b", "zb1p --micro-batches 3", "ddg --micro-batches 2 --ahead part"),
    *("fr", "fdg", "fdg --beta 0.5 --at mixed", "fdg --order backward-first", "adl --accumulate 2 --reduce mean", "dsp --p 1 --q 1"),
    *("2bw", "paci", "dgl", "interlocking --n-wise 2 --combine sum", "dgl-async --order sampled --buffer 2"),
]
NUMBERS = ["x", "", "nan", "-7", "1e99", "9" * 30, "--", "0x10", "1;2", "½"]


def _invalid(kind: Any, draw: random.Random) -> str:
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    if any(get_origin(one) is Literal for one in kinds):
        return draw.choice(["nonsense", "", "1", "AUTO ", "\t"])
    if bool in kinds:
        return "maybe"
    if int in kinds or float in kinds:
        return draw.choice([*NUMBERS, "1.5"] if int in kinds else NUMBERS)
    return draw.choice(["", "\0", "nonsense:1:2:3", "=", ":"])


def options(draw: random.Random, folder: Path) -> Iterator[Input]:
    """Options with values that they may have, and with values that no option of their type has."""
    names = [name for name in OPTIONS if name not in NOT_DRAWN]
    typed = [name for name in names if get_origin(OPTIONS[name].kind) is not tuple and "str" not in str(OPTIONS[name].kind)]
    while True:
        match draw.randrange(3):
            case 0:
                name = draw.choice([name for name in VALID if VALID[name]])
                value = draw.choice(VALID[name])
                yield Input(["train", *TINY, f"--{name.replace('_', '-')}", *value.split()], True, f"{name} {value}")
            case 1:
                method = draw.choice(METHODS)
                yield Input(["train", *TINY, "--method", *method.split()], True, method)
            case _:
                name = draw.choice(typed)
                value = _invalid(OPTIONS[name].kind, draw)
                yield Input(["train", *TINY, f"--{name.replace('_', '-')}={value}"], False, f"{name} {value!r}")


# ---- files ---------------------------------------------------------------------------------------------------------------------------


def damaged(whole: bytes, draw: random.Random) -> bytes:
    """Bytes that differ somewhere: changed, left out, put in, doubled, cut off."""
    while True:
        at, count = draw.randrange(len(whole)), draw.randrange(1, 9)
        match draw.randrange(5):
            case 0:
                other = whole[:at] + bytes([whole[at] ^ 1 << draw.randrange(8)]) + whole[at + 1 :]
            case 1:
                other = whole[:at] + whole[at + count :]
            case 2:
                other = whole[:at] + draw.randbytes(count) + whole[at:]
            case 3:
                other = whole[: at + count] + whole[at:]
            case _:
                other = whole[:at]
        if other != whole:
            return other


def configs(draw: random.Random, folder: Path) -> Iterator[Input]:
    """TOML files: of valid options, of one invalid one, and damaged ones that Python cannot read either."""
    base = 'model = "mlp"\nlimit = 64\nbatch_size = 32\nbatches = 2\ntest_batch_size = 512\nworkers = "inline"\n'
    wrong = ["seed = 'x'", "seed = 1.5", "nonsense = 1", "[table]\na = 1", "lr = [1]", "method = 3", "pin = 1", "seed = -1", "batches = 0"]
    wrong += [
        f"seed = {'9' * 5000}",
        f"cuts = {'[' * 2000}{']' * 2000}",
        "method = 'fgd'",
        "cuts = [true]",
        "seed = 2020-01-01",
        "lr = nan",
    ]
    while True:
        path = folder / "my.toml"
        path.unlink(missing_ok=True)
        match draw.randrange(3):
            case 0:
                more = "".join(f"{name} = {value}\n" for name, value in draw.sample(GOOD, 3))
                path.write_text(base + more)
                valid, what = True, more
            case 1:
                what = draw.choice(wrong)
                path.write_text(base + what + "\n")
                valid = False
            case _:
                text = damaged(base.encode(), draw)
                if _parses(text):
                    continue  # it may be valid, or not
                path.write_bytes(text)
                valid, what = False, repr(text)
        yield Input(["train", "--config", str(path)], valid, what)


GOOD = [("seed", 3), ("lr", 0.05), ("momentum", 0.5), ("stages", 2), ("chunks", 2), ("amp", '"bf16"'), ("threads", 1), ("eval-every", 1)]


def _parses(text: bytes) -> bool:
    try:
        tomllib.loads(text.decode())
    except (ValueError, RecursionError):
        return False
    return True


FORMATS = [*(("png", mode) for mode in ("RGB", "L", "P", "RGBA", "1")), ("jpg", "RGB"), ("jpg", "CMYK"), ("bmp", "L"), ("webp", "RGB")]
SHORT = ["--model", "mlp", "--batch-size", "2", "--batches", "2"]


def images(draw: random.Random, folder: Path) -> Iterator[Input]:
    """Folders of images in every mode, and with a file that Pillow cannot read."""
    root = folder / "pictures"
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            (root / part / name).mkdir(parents=True, exist_ok=True)
            for i in range(2):
                Image.fromarray(np.full((8, 8, 3), 40 * i, np.uint8)).save(root / part / name / f"{i}.png")
    words = ["train", "--data", "folder", "--data-dir", str(root), "--image-size", "8", *SHORT]
    while True:
        drawn = draw.randrange(10**6)
        pixels = np.random.default_rng(drawn).integers(0, 256, (draw.randrange(1, 20), draw.randrange(1, 20), 3), dtype=np.uint8)
        kind, mode = draw.choice(FORMATS)
        content = io.BytesIO()
        Image.fromarray(pixels).convert(mode).save(content, {"jpg": "jpeg"}.get(kind, kind))
        odd = draw.random() < 0.5
        found = damaged(content.getvalue(), draw) if odd else content.getvalue()
        path = root / "train" / "dog" / f"x.{kind}"
        path.write_bytes(found)
        yield Input([*words, "--workers", "inline"], _shows(path), f"{kind} {mode} {drawn} odd {odd}")
        path.unlink()


def _shows(path: Path) -> bool:
    try:
        with Image.open(path) as opened:
            opened.convert("RGB")
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError):
        return False
    return True


def texts(draw: random.Random, folder: Path) -> Iterator[Input]:
    """Texts in any script, bytes that are no text, and texts that are too short."""
    path = folder / "a.txt"
    while True:
        level, drawn = draw.choice(["char", "byte"]), draw.randrange(4)
        if drawn < 2:
            text = "".join(chr(draw.choice([*range(32, 127), *range(0x400, 0x450), 0x1F600, 10])) for _ in range(draw.randrange(400, 900)))
            content, valid = text.encode(), True
        elif drawn == 2:
            content, valid = b"ab" * draw.randrange(0, 8), False
        else:
            content, valid = b"a text " * 60 + draw.choice([b"\xff", b"\xc3\x28", b"\xed\xa0\x80"]) + b" and more" * 20, level == "byte"
        path.write_bytes(content)
        yield Input(["train", *TEXT, "--text", str(path), "--level", level, "--workers", "inline"], valid, f"{level} {content[:40]!r}")


def models(run: Path) -> Callable[[random.Random, Path], Iterator[Input]]:
    """Weights of a run, as they are and damaged."""

    def drawn(draw: random.Random, folder: Path) -> Iterator[Input]:
        own = folder / "run"
        shutil.copytree(run, own)
        whole = (own / "model.safetensors").read_bytes()
        while True:
            odd = draw.random() < 0.6
            (own / "model.safetensors").write_bytes(damaged(whole, draw) if odd else whole)
            yield Input(["eval", str(own)], not odd, "a model")

    return drawn


def traces(run: Path) -> Callable[[random.Random, Path], Iterator[Input]]:
    """Traces of a free run: whole, cut off, with lines that are lost, doubled, swapped, damaged, or no visits."""

    def drawn(draw: random.Random, folder: Path) -> Iterator[Input]:
        own = folder / "run"
        while True:
            shutil.rmtree(own, ignore_errors=True)
            shutil.copytree(run, own)
            trace = own / "trace.jsonl"
            lines = trace.read_text().splitlines(keepends=True)
            n, valid, how = draw.randrange(len(lines) - 1), False, draw.randrange(6)
            match how:
                case 0:
                    valid = True
                case 1:
                    (own / "model.safetensors").unlink()
                    trace.write_text("".join(lines[:n]) + lines[n][: draw.randrange(20)])
                    valid = True
                case 2:
                    trace.write_text("".join([*lines[:n], *lines[n + 1 :]]))
                case 3:
                    trace.write_text("".join([*lines[: n + 1], *lines[n:]]))
                case 4:
                    lines[n], lines[n + 1] = lines[n + 1], lines[n]
                    trace.write_text("".join(lines))
                case _:
                    values = json.loads(lines[n])
                    values[draw.choice(list(values)[:-1])] = draw.choice([-1, 10**9, "x", None, [], {}, 1e300])
                    del values["seal"]
                    bare = [re.sub(r', "seal": \d+', "", line) for line in lines]
                    bare[n] = json.dumps(values) + "\n"
                    whole = "x" in bare[n] and draw.random() < 0.3  # sealed by somebody who knows how
                    trace.write_text(sealed(bare, 0)[0] if whole else "".join([*lines[:n], bare[n], *lines[n + 1 :]]))
            yield Input(["replay", str(own)], valid, f"line {n}, way {how}")

    return drawn


def caches(draw: random.Random, folder: Path) -> Iterator[Input]:
    """Decoded images in the cache, damaged: they are decoded again, and nothing is wrong."""
    given = next(iter(images(draw, folder)))
    (folder / "pictures" / "train" / "dog").mkdir(exist_ok=True)
    for path in (folder / "pictures" / "train" / "dog").glob("x.*"):
        path.unlink()
    while True:
        yield Input(given.words, True, "a cache")
        for path in (folder / "cache").glob("images-*.pt"):
            path.write_bytes(damaged(path.read_bytes(), draw))
