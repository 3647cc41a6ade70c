"""How far an optimizer step moves the weights."""

import torch
from torch.distributed.tensor import DTensor

SAMPLE = 2**16  # weights by which an update is measured


class UpdateRatio:
    """How far steps move the weights that are trained: ‖Δw‖ / ‖w‖, over a sample of them.

    The sample is every n-th element, about `SAMPLE` in all; of sharded weights, those of this process.
    """

    def __init__(self, model: torch.nn.Module):
        self._trained = [p for p in model.parameters() if p.requires_grad]
        count = sum(p.numel() for p in self._trained)
        self._every = 6 * (count // SAMPLE // 6) + 1  # else it might be the same few columns of each weight
        self._before = self._sample()

    def since_last(self) -> float:
        """Return ‖Δw‖ / ‖w‖ since the last call."""
        before, self._before = self._before, self._sample()
        return float((self._before - before).norm() / before.norm())

    @torch.no_grad()
    def _sample(self) -> torch.Tensor:
        sample, seen = [], 0
        for parameter in self._trained:
            here = (parameter.to_local() if isinstance(parameter, DTensor) else parameter).flatten()
            sample.append(here[-seen % self._every :: self._every].float())
            seen += len(here)
        return torch.cat(sample)
