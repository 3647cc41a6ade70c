"""Check that accumulation is exact: on the model of a user, and on every head of transformers."""
