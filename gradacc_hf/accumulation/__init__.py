"""Exact gradient accumulation: windows, their split into micro-batches, and the weights of losses."""
