"""What a codec is called and set to: "bf16", "int8", "vq:codes=256:dim=16:every=50"; checked before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import ClassVar, TypeAlias

from delock.errors import UsageError

LARGEST = 65536  # codes: an index then takes two bytes


@dataclass(frozen=True)
class BF16:
    """Rounded to bfloat16: half the bytes of float32. Error: at most 2^-8 of a value."""

    name: ClassVar[str] = "bf16"


@dataclass(frozen=True)
class INT8:
    """Whole numbers -127 .. 127 with a scale per channel: a quarter of float32. Error: at most half a scale, max |x| / 254."""

    name: ClassVar[str] = "int8"


@dataclass(frozen=True)
class VQ:
    """Product quantization: the channels in groups of `dim`, each group with a codebook of `codes` vectors that learns as it goes.

    `groups` may be given in place of `dim`. `every`: batches between two codebooks sent.
    """

    codes: int = 256
    dim: int = 16
    groups: int | None = None
    every: int = 50
    name: ClassVar[str] = "vq"

    def __post_init__(self) -> None:
        if not 2 <= self.codes <= LARGEST:
            raise UsageError(f"a codebook of {self.codes} codes is out of range: vq takes codes=2 to codes={LARGEST}")
        for name, value in (("dim", self.dim), ("groups", self.groups), ("every", self.every)):
            if value is not None and value < 1:
                raise UsageError(f"vq's {name} is {value}, but it must be at least 1")

    @property
    def bits(self) -> int:
        """Bits of an index."""
        return (self.codes - 1).bit_length()

    def length(self, channels: int) -> int:
        """d: channels in a group. Raises UsageError where the groups are not of equal size."""
        if self.groups is None and channels % self.dim == 0:
            return self.dim
        if self.groups is not None and channels % self.groups == 0:
            return channels // self.groups
        asked = f"{self.groups} groups" if self.groups is not None else f"groups of {self.dim}"
        sizes = ", ".join(str(n) for n in range(1, channels + 1) if channels % n == 0)
        raise UsageError(f"vq cannot divide {channels} channels into {asked}: give dim=N (or groups=N) with one of {sizes}")


Codec: TypeAlias = BF16 | INT8 | VQ
NAMES = ("none", "bf16", "int8", "vq")


def parse(text: str) -> Codec | None:
    """The codec of activations that is called so; None for "none". Raises UsageError for what does not exist or is out of range."""
    name, *settings = text.split(":")
    if name not in NAMES:
        near = get_close_matches(name, NAMES, n=1)
        raise UsageError(f"no codec is called {name!r}" + (f"; did you mean {near[0]!r}?" if near else f": use {', '.join(NAMES)}"))
    if name == "vq":
        return _vq(text, settings)
    if settings:
        raise UsageError(f"the codec {name} has no settings, but it is given {':'.join(settings)!r}; only vq has")
    return {"none": None, "bf16": BF16(), "int8": INT8()}[name]


def parse_error(text: str) -> BF16 | INT8 | None:
    """The codec of errors that is called so. Raises UsageError for vq, and as `parse` does."""
    codec = parse(text)
    if isinstance(codec, VQ):
        raise UsageError("errors travel as none, bf16 or int8: the codebooks of vq learn what activations look like")
    return codec


def spelled(codec: Codec | None) -> str:
    """The codec as the user would write it: `parse` reads it."""
    if not isinstance(codec, VQ):
        return codec.name if codec else "none"
    usual, rest = VQ(), ("codes", "groups" if codec.groups is not None else "dim", "every")
    return ":".join(["vq", *(f"{name}={value}" for name in rest if (value := getattr(codec, name)) != getattr(usual, name))])


def _vq(text: str, settings: list[str]) -> VQ:
    known = [option.name for option in fields(VQ)]
    given: dict[str, int] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if name not in known:
            near = get_close_matches(name, known, n=1)
            raise UsageError(f"{text}: vq has no setting {name!r}" + (f"; did you mean {near[0]!r}?" if near else f": {', '.join(known)}"))
        if not equals or not value.removeprefix("-").isdecimal():
            raise UsageError(f"{text}: {name} is {value!r}, but it must be a whole number, as in vq:codes=256:dim=16:every=50")
        if name in given:
            raise UsageError(f"{text}: {name} is given twice")
        given[name] = int(value)
    if "dim" in given and "groups" in given:
        raise UsageError(f"{text}: dim and groups say the same thing, so give one of them")
    return replace(VQ(), **given)
