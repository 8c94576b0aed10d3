"""Keeps the traces of models on disk, with their proof, by a key of all that they follow from."""
