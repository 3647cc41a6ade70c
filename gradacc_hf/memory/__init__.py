"""Predict the memory of a training step, without weights and without a GPU.

| module | purpose |
|---|---|
| `memory/trace.py` | trace one step, operation by operation |
| `memory/extrapolate.py` | derive steps of any size from a few traces |
| `memory/estimator.py` | estimate a step of a model and an optimizer |
| `run/memory_bound.py` | estimate a step of a recipe, and cache the estimate |
| `accumulation/memory_model.py` | hold the estimate as numbers |
| `accumulation/splitting.py` | `Bound` limits a micro-batch by the estimate |
| `run/memory_advice.py` | find settings that take less memory |
"""
