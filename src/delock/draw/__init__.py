"""Draws schedules and runs as PNG and SVG, and progress as a line. matplotlib is loaded for the first picture; torch is not loaded."""

from delock.draw.chrome import chrome
from delock.draw.curves import Run, curves
from delock.draw.gantt import gantt
from delock.draw.progress_bar import ProgressBar

__all__ = ["ProgressBar", "Run", "chrome", "curves", "gantt"]
