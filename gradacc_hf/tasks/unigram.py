"""A language model that reads nothing: the baseline of those that write."""

import math
from collections import Counter
from collections.abc import Iterable


def unigram_loss(train: Iterable[int], validation: Iterable[int], vocabulary: int) -> float:
    """The mean loss (nats) of validation tokens, each as likely as it is in training.

    Every token of the `vocabulary` counts once more than it is there (Laplace), so that none is impossible.
    """
    seen, found = Counter(train), Counter(validation)
    total = math.log(seen.total() + vocabulary)
    return sum(count * (total - math.log(seen[token] + 1)) for token, count in found.items()) / found.total()


def perplexity(loss: float) -> float:
    """How many tokens a model hesitates between: e to its mean loss (nats); at most e⁷⁰⁰."""
    return math.exp(min(loss, 700))
