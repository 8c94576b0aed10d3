"""Cuts a network into stages: its layers, their cost in seconds, their memory in bytes, and the cuts that balance them."""
