"""Run by torchrun from tests/padding/test_distributed.py: gradients without padding under DDP and FSDP2.

Each process has its own half of a batch, one of them without padding. `check` raises if the gradient is not
the mean of the gradients of the padded halves. Process 0 prints the errors.
"""

import copy
import sys

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import gradacc_hf
from gradacc_hf.accumulation.reference import EXACT, read_gradient, relative_error, whole_window_gradient
from gradacc_hf.errors import PaddingNotRemovableError
from gradacc_hf.padding.removal import is_removed, remove_padding_in_all
from gradacc_hf.utils.modeling import checkpoint_activations
from gradacc_hf.verification.tiny_models import build_head


def check(engine, model_type, when, checkpointing=False):
    """Return the error of the gradient under an engine; padding is removed "before" or "after" wrapping."""
    head = build_head("masked_lm", model_type)
    model = head.model
    halves = [[19, 7, 7, 12], [9, 9, 9, 9], [5, 30, 6, 8]]
    batches = [head.collate(head.examples(lengths, seed)) for seed, lengths in enumerate(halves)]
    batches = batches[: dist.get_world_size()]
    references = [whole_window_gradient(copy.deepcopy(model), batch) for batch in batches]
    expected = {name: sum(one[name] for one in references) / len(references) for name in references[0]}
    mine = batches[dist.get_rank()]
    if checkpointing:
        checkpoint_activations(model)
    if when == "before":
        gradacc_hf.remove_padding(model, mine)
    if engine == "ddp":
        wrapped = DistributedDataParallel(model)
    else:
        for layer in model.base_model.encoder.layer:
            fully_shard(layer)
        wrapped = fully_shard(model)
    if when == "after":
        gradacc_hf.remove_padding(wrapped, mine)
    wrapped(**mine).loss.backward()
    error = relative_error(read_gradient(model), expected)
    assert error < EXACT, (engine, model_type, when, error)
    return error


def check_agreement():
    """Check that a model which cannot be checked in one process stays padded in both."""
    accelerator, head = Accelerator(cpu=True), build_head("masked_lm", "bert")
    batch = head.collate(head.examples([19, 7, 7, 12] if accelerator.process_index else [9, 9, 5, 14]))
    if accelerator.process_index:
        head.model.config.layerdrop = 0.5
    with pytest.raises(PaddingNotRemovableError) as caught:
        remove_padding_in_all(head.model, batch, accelerator)
    assert not is_removed(head.model)
    assert ("in another process" in str(caught.value)) == accelerator.is_main_process
    head.model.config.layerdrop = 0.0
    if accelerator.process_index:
        batch = {}  # that of the first process is checked
    remove_padding_in_all(head.model, batch, accelerator)
    assert is_removed(head.model)


def check_16_bits():
    """Check that DDP still reduces the gradients of 16-bit weights after the check in float32."""
    head = build_head("sequence_classification", "bert")
    model = DistributedDataParallel(head.model.bfloat16())
    batch = head.collate(head.examples([19, 7, 7, 12 + dist.get_rank()]))
    gradacc_hf.remove_padding(model, batch)
    model(**batch).loss.backward()
    own = torch.cat([grad.flatten().float() for grad in read_gradient(head.model).values()])
    found = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(found, own)
    assert torch.equal(*found)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if "agreement" in sys.argv:
        check_agreement()
        check_16_bits()
        dist.destroy_process_group()
        sys.exit()
    dist.init_process_group("gloo")
    for engine in ("ddp", "fsdp2"):
        for model_type in ("bert", "deberta-v2"):
            for when in ("before", "after"):
                error = check(engine, model_type, when, checkpointing="checkpointing" in sys.argv)
                if dist.get_rank() == 0:
                    print(f"{engine} {model_type} {when} {error:.0e}", flush=True)
    dist.destroy_process_group()
