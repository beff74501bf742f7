"""Mistakes made on purpose in transformers' Llama, to see whether `llama3np diagnose` names them."""
