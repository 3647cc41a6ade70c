"""Every text head of transformers is exact without padding, or refused with a reason, and never wrong.

python tests/padding/test_all_architectures.py [KIND ...]     prints the table of all heads, in minutes
"""

import copy
import sys
import warnings
from collections import Counter

import pytest
import torch

import gradacc_hf
from gradacc_hf.accumulation.reference import compare, whole_window_gradient
from gradacc_hf.errors import HeadUnavailableError, PaddingNotRemovableError
from gradacc_hf.padding.removal import is_grouped
from gradacc_hf.verification.tiny_models import KINDS, build_head, model_types

TEXT_KINDS = [kind for kind in KINDS if not kind.startswith(("image", "audio", "ctc"))]
CHECKED_ON = [17, 9, 26, 9, 12, 5]
OTHERS = [[31, 4, 14, 14, 8], [22, 20, 21], [3, 40, 3, 3], [12, 12, 12]]
"""Lengths of batches after the check. The last has padding in every row."""


def outcome(kind, model_type):
    """Return "exact by groups", "exact with padded attention", "refused: …", "not built: …" or "WRONG: …"."""
    try:
        head = build_head(kind, model_type)
    except HeadUnavailableError as error:
        return f"not built: {error}"
    padded = copy.deepcopy(head.model)
    checked = head.collate(head.examples(CHECKED_ON))
    if "attention_mask" not in checked:
        return "not built: the head takes no attention mask"
    try:
        gradacc_hf.remove_padding(head.model, checked)
    except PaddingNotRemovableError as error:
        return f"refused: {error}"
    for seed, lengths in enumerate(OTHERS, start=1):
        batch = head.collate(head.examples(lengths, seed), pad_to=max(lengths) + 3 * (seed == len(OTHERS)))
        reference = whole_window_gradient(padded, batch)
        found = compare("without padding", whole_window_gradient(head.model, batch), reference)
        if not found.exact:
            return f"WRONG: the gradient is off by {found.error:.0e} for lengths {lengths}"
    return "exact by groups" if is_grouped(head.model) else "exact with padded attention"


def table(heads):
    """Return the outcome of each head, and print them as they come."""
    found = {}
    for kind, model_type in heads:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                found[kind, model_type] = outcome(kind, model_type)
            except Exception as error:  # an error of the model itself, with padding
                found[kind, model_type] = f"ERROR: {type(error).__name__}: {error}"
        print(f"{kind:24} {model_type:28} {found[kind, model_type]}", flush=True)
    print(Counter(text.split(":")[0] for text in found.values()))
    return found


SOME = [(kind, model_type) for kind in TEXT_KINDS for model_type in model_types(kind)[::17]]
ALL = [(kind, model_type) for kind in TEXT_KINDS for model_type in model_types(kind)]


@pytest.mark.slow
@pytest.mark.parametrize("heads", [pytest.param(SOME, id="some"), pytest.param(ALL, id="all")])
def test_no_head_is_wrong(heads):
    found = table(heads)
    assert {head: text for head, text in found.items() if text.startswith(("WRONG", "ERROR"))} == {}
    assert sum(text.startswith("exact") for text in found.values()) > len(found) / 3


if __name__ == "__main__":
    torch.set_num_threads(1)
    table([head for head in ALL if head[0] in (sys.argv[1:] or TEXT_KINDS)])
