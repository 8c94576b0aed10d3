"""Starts, watches and ends ranks: one process per stage on this host, or the ranks that torchrun gives. Knows nothing of training."""
