"""Starts, watches and ends ranks, without knowing about training: one process per stage here, or the ranks that torchrun starts."""
