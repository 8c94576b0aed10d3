"""Pictures of schedules and of runs, as PNG and SVG. matplotlib is loaded when the first one is drawn; no torch."""

from delock.draw.chrome import chrome
from delock.draw.curves import Run, curves
from delock.draw.gantt import gantt

__all__ = ["Run", "chrome", "curves", "gantt"]
