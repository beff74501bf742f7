"""Adapters to copy next to another implementation: they write what llama3np compare reads."""
