"""Sets what all pictures share: colours that colour-blind readers can distinguish, fonts, and files that are equal for equal input."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito 2008; their yellow, which is pale on white, is left to small marks, and grey stands in
BLACK, ORANGE, SKY, GREEN, YELLOW = "#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442"
BLUE, VERMILION, PURPLE, GREY = "#0072B2", "#D55E00", "#CC79A7", "#7F7F7F"
LANE, PALE = "#EDEDED", "#F7D9A0"  # PALE: orange, lighter

STYLE = MappingProxyType(
    {
        "figure.dpi": 150,
        "savefig.dpi": 150,
        "figure.facecolor": "white",
        "font.family": "DejaVu Sans",  # comes with matplotlib
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 9,
        "axes.titlelocation": "left",
        "legend.frameon": False,
        "svg.hashsalt": "delock",  # else the ids in the file are random
    }
)


def style() -> AbstractContextManager[None]:
    """Returns a context with the settings above, to draw and save in; the caller's settings are restored after it."""
    import matplotlib

    settings: Any = dict(STYLE)
    return matplotlib.rc_context(settings)


def new(width: float, height: float) -> Figure:
    """Returns an empty figure of this size in inches; pyplot and its global state are not used."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Figure, stem: str | Path) -> list[Path]:
    """Writes STEM.png and STEM.svg and returns their paths; a suffix .png or .svg of the stem is removed first."""
    path = Path(stem)
    path = path.with_suffix("") if path.suffix in (".png", ".svg") else path
    files = [path.with_name(path.name + suffix) for suffix in (".png", ".svg")]
    for file in files:
        figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
    return files
