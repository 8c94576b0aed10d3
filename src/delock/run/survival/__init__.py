"""Checkpoints of a run: when they are made, what is in them, and how a run goes on from one, in the same stages or in others."""
