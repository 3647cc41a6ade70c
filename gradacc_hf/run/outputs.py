"""The outputs of saved models on rows of a run's data, and how far two models differ.

`gradacc merge` and `gradacc export` compare what they write with the model of the run.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator

from gradacc_hf.accumulation.splitting import Bound
from gradacc_hf.recipe.base import Recipe
from gradacc_hf.run.setup import load_data, make_windows

TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""Number format of the weights → the largest difference of outputs, as a share of the largest output."""


@dataclass(frozen=True)
class Difference:
    """The difference of the outputs of two models.

    largest: the largest difference of two outputs.
    scale: the largest absolute output of the run's model.
    rows: the rows that were compared.
    """

    largest: float
    scale: float
    rows: int

    @property
    def relative(self) -> float:
        """The largest difference as a share of the largest output."""
        return self.largest / self.scale if self.scale else self.largest

    def __str__(self) -> str:
        share = f"{self.relative:.1e} of the largest output"
        return f"largest difference {self.largest:.1e} on {self.rows} rows of the data, {share}"


def batch_of_rows(recipe: Recipe, rows: int) -> dict[str, Any]:
    """Return a batch of the first validation rows of a run, on the host."""
    recipe, training, validation = load_data(recipe)
    validation = validation.select(range(min(rows, len(validation))))
    one_each = Bound(micro_batch_size=1)
    _, windows = make_windows(recipe, training, validation, Accelerator(cpu=True), one_each)
    return dict(windows.collated(range(len(validation))).batch)


@torch.inference_mode()
def outputs_of(model: Any, batch: Mapping[str, Any], device: str) -> list[torch.Tensor]:
    """Return the outputs of a model for a batch, in float32 on the host, without the loss."""
    model.to(device).eval()
    found = model(**{name: x.to(device) if hasattr(x, "to") else x for name, x in batch.items()})
    values = found.items() if isinstance(found, Mapping) else [("output", found)]
    tensors = [
        x for name, x in values if isinstance(x, torch.Tensor) and x.is_floating_point() and name != "loss"
    ]
    model.cpu()
    return [tensor.float().cpu() for tensor in tensors]


def difference(one: list[torch.Tensor], other: list[torch.Tensor], rows: int) -> Difference:
    """Return the difference of the outputs `other` from the outputs `one` of the run's model."""
    pairs = list(zip(one, other, strict=True))
    largest = max(float((a - b).abs().max()) for a, b in pairs)
    return Difference(largest, max(float(a.abs().max()) for a, _ in pairs), rows)
