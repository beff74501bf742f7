"""Mistakes made on purpose in transformers' Llama, for `llama3np diagnose` to name."""
