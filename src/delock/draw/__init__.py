"""Draws schedules and runs as PNG and SVG. matplotlib is loaded when the first picture is drawn; torch is not loaded."""

from delock.draw.chrome import chrome
from delock.draw.curves import Run, curves
from delock.draw.gantt import gantt

__all__ = ["Run", "chrome", "curves", "gantt"]
