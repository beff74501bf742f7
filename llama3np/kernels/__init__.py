"""How a stored weight multiplies."""
