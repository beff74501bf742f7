"""Checkpoints of every format."""
