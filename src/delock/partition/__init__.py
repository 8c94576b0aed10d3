"""A network as layers, its stages, and what its layers cost and hold."""
