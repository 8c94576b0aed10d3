"""Checkpoints on disk: plain values and tensors in safetensors files, a manifest, and a folder that appears whole or not at all."""
