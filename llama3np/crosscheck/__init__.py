"""The cross-checker: trace a model, compare another implementation's trace, say what is wrong."""
