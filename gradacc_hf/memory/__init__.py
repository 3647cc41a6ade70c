"""What a training step takes in memory, predicted without weights and without a GPU.

`tracing.py`: the bytes of one step, operation by operation. `moments.py`: of steps of any size, from a few.
`estimate.py`: of a model and an optimizer. `of_recipe.py`: of a recipe, kept in a cache. `micro_batch.py`:
the result, numbers alone, by which `split.Bound` bounds a micro-batch. `levers.py`: what would take less.
"""
