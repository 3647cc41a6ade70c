"""Every text head of transformers is exact without padding, or refused with a reason, and never wrong.

python tests/padding/test_all_architectures.py [KIND ...]     prints the table of all heads, in minutes
"""

import sys
import warnings
from collections import Counter

import pytest
import torch

from gradacc_hf.errors import HeadUnavailableError
from gradacc_hf.verification.all_heads import padding_outcome
from gradacc_hf.verification.tiny_models import KINDS, build_head, model_types

TEXT_KINDS = [kind for kind in KINDS if not kind.startswith(("image", "audio", "ctc"))]


def outcome(kind, model_type):
    """Return the outcome of a head, or "not built: …"."""
    try:
        return padding_outcome(build_head(kind, model_type))
    except HeadUnavailableError as error:
        return f"not built: {error}"


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
