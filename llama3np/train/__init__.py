"""Training in plain array operations: the backward pass, AdamW, and the loop around them."""
