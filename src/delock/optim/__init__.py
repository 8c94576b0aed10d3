"""Provides optimizers and learning rates as factories that every stage calls for itself."""
