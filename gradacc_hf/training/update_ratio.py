"""The size of optimizer steps, relative to the weights."""

import torch
from torch.distributed.tensor import DTensor

SAMPLE = 2**16  # weights in the sample


class UpdateRatio:
    """The relative size of optimizer steps: ‖Δw‖ / ‖w‖ over a sample of the trained weights.

    The sample is every n-th element, about `SAMPLE` in total. With sharded weights, it comes from the shards
    of this process.
    """

    def __init__(self, model: torch.nn.Module):
        self._trained = [p for p in model.parameters() if p.requires_grad]
        count = sum(p.numel() for p in self._trained)
        # 1 more than a multiple of 6: other strides may hit the same few columns of each weight.
        self._every = 6 * (count // SAMPLE // 6) + 1
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
