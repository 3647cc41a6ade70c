"""Pairs of summaries of functions: the right one, and one of another function, of about the same length."""

from datasets import Dataset

from gradacc_hf.embedded.stdlib import documented_functions

LEAST_CHARACTERS, MOST_CHARACTERS = 20, 60  # of a summary, so that a run on a CPU is short
MOST_IN_SIGNATURE = 60
TRAINING_ROWS, VALIDATION_ROWS = 128, 64


def preferences() -> tuple[Dataset, Dataset]:
    """Return (train, validation) of `prompt`, `chosen` and `rejected`: texts.

    The prompt is the signature of a function up to its docstring. The chosen answer is the summary of the
    function. The rejected answer is the summary of another function. Summaries next to each other in length
    are rejected for each other, so that no choice by length is better than chance.
    """
    train, validation = documented_functions()
    return _pairs(train, TRAINING_ROWS), _pairs(validation, VALIDATION_ROWS)


def _pairs(rows: Dataset, number: int) -> Dataset:
    kept = {}
    for row in rows.shuffle(seed=0).to_list():
        signature, summary = row["source"].partition("\n")[0], row["summary"].rstrip(".")
        of_size = LEAST_CHARACTERS <= len(summary) <= MOST_CHARACTERS and len(signature) <= MOST_IN_SIGNATURE
        if of_size and signature.startswith("def ") and signature.endswith(":") and len(kept) < number:
            kept.setdefault(summary, signature)
    in_order = sorted(kept, key=lambda summary: (len(summary), summary))
    other = dict(zip(in_order[::2], in_order[1::2], strict=True))
    other |= {right: left for left, right in other.items()}
    pairs = [
        {"prompt": f'{signature}\n    """', "chosen": summary, "rejected": other[summary]}
        for summary, signature in kept.items()
    ]
    return Dataset.from_list(pairs)
