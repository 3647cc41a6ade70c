"""KL from the reference, a metric of preferences: over the whole vocabulary, at the tokens of answers.

KL(model ‖ reference) = Σ_v π(v) (log π(v) − log π_ref(v)) at each token of an answer, given the tokens before
it. It is never negative. An estimate from the log-probabilities of given answers may be, because the model
did not write them.
"""

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate import Accelerator
from torch.nn.functional import kl_div

from gradacc_hf.accumulation.loss_items import IGNORED
from gradacc_hf.accumulation.oom import out_of_memory
from gradacc_hf.errors import InputError
from gradacc_hf.tasks.references import Answer
from gradacc_hf.training.lora import pretrained
from gradacc_hf.utils.hardware import say
from gradacc_hf.utils.memory import release_memory
from gradacc_hf.utils.modeling import without_dropout

EXAMPLES = 16
"""Validation examples whose answers are measured, spread evenly over the data."""
TOKENS_AT_ONCE = 64
"""Tokens whose distributions are in float32 at once."""


@torch.no_grad()
def mean_kl(
    model: Any,
    reference: Callable[[], AbstractContextManager[Any]],
    answers: Sequence[Answer],
    accelerator: Accelerator,
) -> float:
    """Return KL(model ‖ reference) in nats, a mean over the tokens of all answers. Call it in all processes.

    Args:
        model: A causal language model, on the device.
        reference: Returns a context with the reference. It may be the model without its adapters.
        answers: Token ids and labels of prompts with answers.
        accelerator: The Accelerator of the run. It splits the answers over the processes.
    """
    ours, step = accelerator.process_index, accelerator.num_processes
    sums = torch.zeros(2, device=accelerator.device)
    with without_dropout(model, training=False), accelerator.autocast():
        for number in range(ours, -(-len(answers) // step) * step, step):  # as many forwards in each process
            answer = answers[number % len(answers)]
            of_model = _logits(model, answer, accelerator.device)
            with reference() as other:
                of_reference = _logits(other, answer, accelerator.device)
            if number < len(answers):
                each = _of_tokens(of_model, of_reference)
                sums += torch.stack([each.sum(), each.new_tensor(len(each))])
    of_all: Any = accelerator.reduce(sums, reduction="sum")
    total, tokens = of_all.tolist()
    return max(total / tokens, 0.0)  # below 0 by rounding, for equal models


def load_reference(load: Callable[[], Any], accelerator: Accelerator) -> Any:
    """Return a second model on the device. None in all processes if one of them cannot load it.

    A line on stderr states why.
    """
    model, problem = None, "another process has no memory for it"
    try:
        model = load().to(accelerator.device).eval()
    except InputError as error:  # in an evaluation after the run
        problem = str(error)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        problem = "no memory is left for it"
    missing = torch.tensor(float(model is None), device=accelerator.device)
    if not accelerator.reduce(missing, reduction="sum"):
        return model
    say(f"kl is left out, as it needs the model from which training started: {problem}")
    del model
    release_memory()
    return None


def _logits(model: Any, answer: Answer, device: torch.device) -> torch.Tensor:
    """Return the logits of the vocabulary at the labelled tokens (tokens, vocabulary)."""
    ids, labels = (torch.tensor(part, device=device) for part in answer)
    places = (labels[1:] != IGNORED).nonzero()[:, 0]
    first, keeps = 0, {}
    if "logits_to_keep" in inspect.signature(pretrained(model).forward).parameters:
        first = int(places[0])
        keeps = {"logits_to_keep": len(ids) - first}
    logits = model(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None], **keeps).logits[0]
    return logits[places - first]


def _of_tokens(of_model: torch.Tensor, of_reference: torch.Tensor) -> torch.Tensor:
    """Return KL(model ‖ reference) at each token (tokens,), from logits (tokens, vocabulary)."""
    found = []
    for parts in zip(of_model.split(TOKENS_AT_ONCE), of_reference.split(TOKENS_AT_ONCE), strict=True):
        model, reference = (part.float().log_softmax(1) for part in parts)
        found.append(kl_div(reference, model, log_target=True, reduction="none").sum(1))
    return torch.cat(found)
