"""A language model of token frequencies: the baseline of recipes that write texts."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping


def unigram_loss(train: Iterable[int], validation: Iterable[int], vocabulary: int) -> float:
    """Return the mean loss (nats) of validation tokens under their frequencies in training.

    Each token of the `vocabulary` counts once more than it occurs (Laplace), so that no probability is 0.
    """
    seen, found = Counter(train), Counter(validation)
    total = math.log(seen.total() + vocabulary)
    return sum(count * (total - math.log(seen[token] + 1)) for token, count in found.items()) / found.total()


def perplexity(loss: float) -> float:
    """Return the perplexity for a mean loss in nats: e to the loss, at most e⁷⁰⁰."""
    return math.exp(min(loss, 700))


def with_perplexity(scores: Mapping[str, float]) -> dict[str, float]:
    """Return scores with a perplexity for each loss: of all rows, and of each source ("loss/chats")."""
    losses = {name: value for name, value in scores.items() if name.partition("/")[0] == "loss"}
    found = {name.replace("loss", "perplexity", 1): perplexity(value) for name, value in losses.items()}
    return {**scores, **found}
