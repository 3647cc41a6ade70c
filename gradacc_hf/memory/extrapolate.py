"""Extrapolate traced steps of a few sizes to the memory of a step of any size, at each moment. Numbers only.

A moment is the state after one operation. The memory held at a moment is a polynomial in rows and lengths,
and linear in the number of equal layers. Traces with different numbers of layers are aligned by their
operations: the common prefix of a phase comes from the first layers, the common suffix from the last layers.
"""

from collections.abc import Sequence

import numpy as np

from gradacc_hf.memory.trace import ATTENTION, LAYERS, Phase, Trace

FORWARD, BACKWARD = 0, 1
REAL_SHARES = (1.0, 0.5, 0.25, 0.125)  # of the tokens of a padded micro-batch


class Fit:
    """Polynomials through values at given sizes.

    Args:
        exponents: powers of rows and lengths in each term, (terms, 1 + columns).
        sizes: rows and lengths, (terms, 1 + columns). Both halves have the same lengths, and each half has
            one number of rows; or all sizes have one row.

    Attributes:
        few: indices of the sizes that suffice for the memory that one more layer adds.
    """

    def __init__(self, exponents: np.ndarray, sizes: np.ndarray):
        self.exponents, self.scale = exponents, sizes.max(axis=0).astype(np.float64)
        self._matrix = _terms(sizes / self.scale, exponents)
        half = len(sizes) // 2
        if half > 1 and exponents[:, 0].any():
            # The part of a layer that is constant in the rows (weights cast by autocast) has no length in it.
            self.few = np.arange(half, 2 * half)
            self._of_layer = np.concatenate([[0], np.arange(half + 1, 2 * half)])
        else:  # there is only one length, or examples are packed into one row
            self.few = self._of_layer = np.arange(len(sizes))

    def polynomials(self, values: np.ndarray) -> np.ndarray:
        """Return the factors of the terms, (terms, …), from values at all sizes, (sizes, …)."""
        return self._unscaled(np.linalg.solve(self._matrix, values.reshape(len(values), -1)), values.shape)

    def of_a_layer(self, differences: np.ndarray) -> np.ndarray:
        """Return the factors of one more layer, (terms, …), from the bytes added at `few` sizes, (few, …)."""
        matrix = self._matrix[np.ix_(self.few, self._of_layer)]
        factors = np.zeros((len(self.exponents), differences[0].size))
        factors[self._of_layer] = np.linalg.solve(matrix, differences.reshape(len(differences), -1))
        return self._unscaled(factors, (len(self.exponents), *differences.shape[1:]))

    def _unscaled(self, factors: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        by_term = np.prod(self.scale**self.exponents, axis=1)
        return (factors / by_term[:, None]).reshape(shape)


def _terms(sizes: np.ndarray, exponents: np.ndarray) -> np.ndarray:
    """Return the value of each term at each size, (sizes, terms)."""
    return np.prod(sizes[:, None, :] ** exponents[None], axis=2)


def moments(fit: Fit, traces: Sequence[Trace], more: Sequence[tuple[int, Sequence[Trace]]]) -> np.ndarray:
    """Return the moments of a model, (moments, terms, labels): bytes of each label of `trace`.

    Args:
        fit: the sizes and the terms.
        traces: traces of the model with few layers, one per size.
        more: one pair per list of equal layers: the number of layers left out, and traces with one layer
            more, at the `few` sizes.
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
    """Return the floating-point operations of forward and backward, as factors of the terms (terms,).

    `moments` documents the arguments.
    """
    counted = np.array([trace.flops for trace in traces], dtype=np.float64)
    factors = fit.polynomials(counted)
    for number, extra in more:
        longer = np.array([trace.flops for trace in extra], dtype=np.float64)
        factors = factors + number * fit.of_a_layer(longer - counted[fit.few])
    return factors


def largest(found: np.ndarray, fit: Fit) -> np.ndarray:
    """Return the moments, (moments, terms, labels), that hold the most at some size and share of padding."""
    columns = fit.exponents.shape[1] - 1
    steps = np.geomspace(1 / 64, 32, 45 if columns == 1 else 9)
    lengths = np.stack(np.meshgrid(*[np.maximum(1, top * steps) for top in fit.scale[1:]]), axis=-1)
    if not fit.exponents[:, 1:].any():  # all examples have one length
        lengths = fit.scale[1:]
    lengths = lengths.reshape(-1, columns)
    rows = 2.0 ** np.arange(14)
    sizes = np.concatenate([np.repeat(rows, len(lengths))[:, None], np.tile(lengths, (len(rows), 1))], axis=1)
    terms = _terms(sizes, fit.exponents).T
    kept = np.ones((len(REAL_SHARES), found.shape[2]))  # without padding, layers hold real tokens only
    kept[:, [LAYERS, ATTENTION]] = np.array(REAL_SHARES)[:, None]
    return found[np.unique([((found @ share) @ terms).argmax(axis=0) for share in kept])]


def _side_by_side(runs: Sequence[Sequence[Phase]]) -> list[tuple[list, np.ndarray]]:
    """Return the operations of each run, and the bytes at all sizes, (sizes, operations, 2)."""
    if any(len({len(phase.operations) for phase in run}) > 1 for run in runs):
        raise ValueError("the operations of the model differ with the size of the micro-batch")
    return [(run[0].operations, np.stack([phase.held for phase in run])) for run in runs]


def _alike(operations: list, others: list) -> int:
    """Return the length of the common prefix."""
    pairs = enumerate(zip(operations, others, strict=False))
    return next((i for i, (one, other) in pairs if one is not other), min(len(operations), len(others)))
