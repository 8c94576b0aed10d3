"""Predicted memory of a stage, from plan and profile."""
