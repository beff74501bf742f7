"""Training in plain array operations: text to tokens, gradients, the optimizer and the loop."""
