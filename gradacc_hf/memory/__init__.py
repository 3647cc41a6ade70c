"""What a training step takes in memory, predicted without weights and without a GPU.

`trace.py` traces one step, operation by operation. `extrapolate.py` derives steps of any size from a few
traces. `estimator.py` estimates a step of a model and an optimizer. `run/memory_bound.py` estimates a step of
a recipe and caches it. `accumulation/memory_model.py` holds the result as numbers, and
`accumulation.splitting.Bound` bounds a micro-batch by it. `run/memory_advice.py` finds settings that take
less memory.
"""
