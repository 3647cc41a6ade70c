"""Examples that are packed into one row attend by groups, without a mask (tokens, tokens)."""

import copy

import pytest
import torch
from torch.overrides import TorchFunctionMode

import gradacc_hf
from gradacc_hf import PaddingNotRemovableError
from gradacc_hf.accumulation.padding_layout import row_layout
from gradacc_hf.accumulation.reference import EXACT, compare, whole_window_gradient
from gradacc_hf.padding.removal import is_removed, skips_unread
from gradacc_hf.tasks.packing import pack
from gradacc_hf.verification.tiny_models import build_head

LENGTHS = [9, 14, 5, 9, 20]
OTHERS = [7, 3, 30, 11, 3]


def make(model_type, **options):
    """Return a padded model, a copy without masks of rows, and a function that returns examples."""
    head = build_head("causal_lm", model_type)

    def examples_of(lengths):
        found = head.examples(lengths)
        for example in found:
            example["labels"] = [-100 if i % 3 == 0 else v for i, v in enumerate(example["input_ids"])]
        return found

    padded = copy.deepcopy(head.model)
    gradacc_hf.remove_padding(head.model, pack(examples_of(LENGTHS)), **options)
    return padded, head.model, examples_of, head.collate


class Attention(TorchFunctionMode):
    """Stores the length of keys and the mask's shape of each attention."""

    def __init__(self):
        super().__init__()
        self.keys, self.masks = [], []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.scaled_dot_product_attention:
            mask = (kwargs or {}).get("attn_mask")
            self.keys.append(args[1].shape[2])
            self.masks.append(None if mask is None else tuple(mask.shape))
        return function(*args, **(kwargs or {}))


def error(model, batch, padded, reference_batch):
    reference = whole_window_gradient(padded, reference_batch)
    return compare("row", whole_window_gradient(model, batch), reference).error


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mistral", "gemma3_text", "gpt_oss", "opt"])
def test_the_gradient_is_that_of_the_padded_examples(model_type):
    padded, model, examples_of, collate = make(model_type)
    examples = examples_of(OTHERS)
    assert error(model, pack(examples), padded, collate(examples)) < EXACT
    assert error(model, collate(examples), padded, collate(examples)) < EXACT


def test_each_attention_has_the_length_of_an_example():
    padded, model, examples_of, _ = make("llama")
    row = pack(examples_of(OTHERS))
    for each, longest in ((model, max(OTHERS)), (padded, sum(OTHERS))):
        with Attention() as seen:
            each.train()(**row)
        assert max(seen.keys) == longest
        assert any(seen.masks) == (each is padded)


def test_a_row_ends_its_last_layer_at_tokens_that_the_loss_reads():
    padded, model, examples_of, collate = make("llama", compute_loss=lambda outputs, batch: outputs.loss)
    assert skips_unread(model)
    examples = examples_of(OTHERS)
    assert error(model, pack(examples), padded, collate(examples)) < EXACT


def test_a_row_of_one_example_and_evaluation_are_as_before():
    padded, model, examples_of, _ = make("llama")
    one, several = pack(examples_of([12])), pack(examples_of(OTHERS))
    with torch.no_grad():
        for row in (one, several):
            logits = [each.eval()(**row).logits for each in (model, padded)]
            torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)


def test_a_model_that_was_checked_with_a_padded_batch_masks_rows_as_before():
    head = build_head("causal_lm", "llama")
    padded = copy.deepcopy(head.model)
    gradacc_hf.remove_padding(head.model, head.collate(head.examples(LENGTHS)))
    row = pack(head.examples(OTHERS))
    with Attention() as seen:
        head.model.train()(**row)
    assert max(seen.keys) == sum(OTHERS)
    assert error(head.model, row, padded, row) < EXACT


def test_a_model_that_cannot_pack_is_refused_and_as_before():
    head = build_head("causal_lm", "bloom")
    with pytest.raises(PaddingNotRemovableError):
        gradacc_hf.remove_padding(head.model, pack(head.examples(LENGTHS)))
    assert not is_removed(head.model)


def test_the_layout_groups_examples_of_a_row_in_the_order_of_the_row():
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 5, 0, 0, 1, 2]])
    layout = row_layout(positions)
    assert layout.shape == (1, 13)
    assert sorted(layout.lengths) == [1, 3, 3, 6]
    assert layout.tokens.tolist() == list(range(13))
    assert len(set(layout.blocks.tolist())) == 13
    blocks = torch.zeros(sum(layout.block_sizes), dtype=torch.long) - 1
    blocks[layout.blocks] = torch.arange(13)
    parts = zip(blocks.split(layout.block_sizes), layout.groups, strict=True)
    examples = [row[row >= 0].tolist() for part, group in parts for row in part.view(group)]
    assert sorted(examples) == [[0, 1, 2], [3, 4, 5, 6, 7, 8], [9], [10, 11, 12]]
    assert row_layout(torch.arange(5)[None]) is None
