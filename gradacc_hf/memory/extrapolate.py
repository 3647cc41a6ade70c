"""Traced steps of a few sizes → what a step of any size holds at each of its moments. Numbers only.

The same moment of steps of several sizes is a polynomial in the size, and with each further equal layer it
holds as much more. Which moments of two models are the same is told by their operations, counted from the
beginning of a phase (what the first layers do) and from its end (what the last ones do).
"""

from collections.abc import Sequence

import numpy as np

from gradacc_hf.memory.trace import Phase, Trace

FORWARD, BACKWARD = 0, 1


class Fit:
    """Polynomials of `exponents` (terms, 1 + columns) through values at `sizes` (terms, 1 + columns).

    The sizes are rows and lengths: the first half with one number of rows, the second with another and the
    same lengths; or all with one row. `few` are the sizes that tell what a further layer adds.
    """

    def __init__(self, exponents: np.ndarray, sizes: np.ndarray):
        self.exponents, self.scale = exponents, sizes.max(axis=0).astype(np.float64)
        self._matrix = _terms(sizes / self.scale, exponents)
        half = len(sizes) // 2
        if half > 1 and exponents[:, 0].any():
            # What a layer adds whatever the rows (weights cast by autocast) does not depend on the length.
            self.few = np.arange(half, 2 * half)
            self._of_layer = np.concatenate([[0], np.arange(half + 1, 2 * half)])
        else:  # one length; or packed into one row
            self.few = self._of_layer = np.arange(len(sizes))

    def polynomials(self, values: np.ndarray) -> np.ndarray:
        """Values (sizes, …) → factors of the terms (terms, …)."""
        return self._unscaled(np.linalg.solve(self._matrix, values.reshape(len(values), -1)), values.shape)

    def of_a_layer(self, differences: np.ndarray) -> np.ndarray:
        """What one more layer adds at the `few` sizes (few, …) → factors of all terms (terms, …)."""
        matrix = self._matrix[np.ix_(self.few, self._of_layer)]
        factors = np.zeros((len(self.exponents), differences[0].size))
        factors[self._of_layer] = np.linalg.solve(matrix, differences.reshape(len(differences), -1))
        return self._unscaled(factors, (len(self.exponents), *differences.shape[1:]))

    def _unscaled(self, factors: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        by_term = np.prod(self.scale**self.exponents, axis=1)
        return (factors / by_term[:, None]).reshape(shape)


def _terms(sizes: np.ndarray, exponents: np.ndarray) -> np.ndarray:
    """(sizes, terms)."""
    return np.prod(sizes[:, None, :] ** exponents[None], axis=2)


def moments(fit: Fit, traces: Sequence[Trace], more: Sequence[tuple[int, Sequence[Trace]]]) -> np.ndarray:
    """The moments (moments, terms, 2) of a model: bytes of activations and of the loss.

    traces: with few layers, at all sizes. more: for each kind of
    layer, how many more there are in truth, and traces with one more of it at the `few` sizes.
    """
    found = []
    for phase in (FORWARD, BACKWARD):
        runs = [[trace.phases[phase] for trace in traces]]
        runs += [[trace.phases[phase] for trace in extra] for _, extra in more]
        (operations, held), *others = _side_by_side(runs)
        polynomials, index = fit.polynomials(held), np.arange(len(operations))
        for (number, _), (longer, held_longer) in zip(more, others, strict=True):
            first, last = _alike(operations, longer), _alike(operations[::-1], longer[::-1])
            added = len(longer) - len(operations)
            blocks = []
            for same, shift in ((index < first, 0), (index >= len(operations) - last, added)):
                at = index[same]
                layer = fit.of_a_layer(held_longer[:, at + shift] - held[fit.few][:, at])
                blocks.append((at, polynomials[:, same] + number * layer))
            index = np.concatenate([at for at, _ in blocks])
            polynomials = np.concatenate([factors for _, factors in blocks], axis=1)
        found.append(polynomials.swapaxes(0, 1))
    return np.concatenate(found)


def flops(fit: Fit, traces: Sequence[Trace], more: Sequence[tuple[int, Sequence[Trace]]]) -> np.ndarray:
    """The operations of a forward and backward, as factors of the terms (terms)."""
    counted = np.array([trace.flops for trace in traces], dtype=np.float64)
    factors = fit.polynomials(counted)
    for number, extra in more:
        longer = np.array([trace.flops for trace in extra], dtype=np.float64)
        factors = factors + number * fit.of_a_layer(longer - counted[fit.few])
    return factors


def largest(found: np.ndarray, fit: Fit) -> np.ndarray:
    """Those of the moments (moments, terms, 2) that hold the most at some size."""
    columns = fit.exponents.shape[1] - 1
    steps = np.geomspace(1 / 64, 32, 45 if columns == 1 else 9)
    lengths = np.stack(np.meshgrid(*[np.maximum(1, top * steps) for top in fit.scale[1:]]), axis=-1)
    if not fit.exponents[:, 1:].any():  # of one length, of which there is nothing to say
        lengths = fit.scale[1:]
    lengths = lengths.reshape(-1, columns)
    rows = 2.0 ** np.arange(14)
    sizes = np.concatenate([np.repeat(rows, len(lengths))[:, None], np.tile(lengths, (len(rows), 1))], axis=1)
    most = (found.sum(axis=2) @ _terms(sizes, fit.exponents).T).argmax(axis=0)
    return found[np.unique(most)]


def _side_by_side(runs: Sequence[Sequence[Phase]]) -> list[tuple[list, np.ndarray]]:
    """Each run's operations, and bytes at all sizes (sizes, operations, 2)."""
    if any(len({len(phase.operations) for phase in run}) > 1 for run in runs):
        raise ValueError("the size of a micro-batch decides which operations there are")
    return [(run[0].operations, np.stack([phase.held for phase in run])) for run in runs]


def _alike(operations: list, others: list) -> int:
    """How many operations are the same, from the first on."""
    pairs = enumerate(zip(operations, others, strict=False))
    return next((i for i, (one, other) in pairs if one is not other), min(len(operations), len(others)))
