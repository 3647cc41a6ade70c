"""The loss of a causal language model, computed without all logits in memory at once.

Logits are tokens × vocabulary, by far the largest tensor of a small model with a large vocabulary.
`make_lean` makes the model compute them for a few hundred tokens at a time, and again in the backward pass
(torch.utils.checkpoint), only for labelled tokens. The gradient equals the gradient of the model's own loss,
to rounding.

Torch 2.13's linear_cross_entropy does the same and computes the gradient in the forward pass. It is not used:
the loss has the precision of the inputs (11.625 for 11.507 in bf16), and older versions lack it.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, wraps
from types import MethodType
from typing import Any, Literal

import torch
from torch._subclasses.fake_tensor import is_fake
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import CausalLMOutput

from gradacc_hf.accumulation.loss_items import IGNORED
from gradacc_hf.errors import InputError, one_line
from gradacc_hf.verification.tiny_models import shrink

TOKENS_PER_CHUNK = 256  # logits in memory at a time; 50 MB in float32 with a vocabulary of 49,152


def make_lean(model: Any, setting: bool | Literal["auto"] = "auto") -> bool:
    """Make a causal language model compute its loss in chunks, if its logits allow it.

    With labels, the outputs then hold only the loss. Without labels (generation), the logits do not change.

    Args:
        model: The model. Its `forward` is replaced.
        setting: "auto": if the logits allow it; False: never; True: always.

    Returns:
        Whether the model computes its loss in chunks now.

    Raises:
        InputError: If `setting` is True and the logits do not allow it.
    """
    if setting is False:
        return False
    if reason := not_lean(model):
        if setting is True:
            raise InputError(f"budget.lean_loss: found true, but {reason}; allowed here: auto or false")
        return False
    model.forward = MethodType(_forward_of(type(model)), model)  # bound, so that a deep copy has its own
    return True


def not_lean(model: Any) -> str | None:
    """Return why the loss cannot be computed from the hidden states and the head; None if it can.

    The model itself is tested: numbers replace the outputs of the head. They must come out as the logits, and
    the loss must be their cross-entropy with the next tokens. A constant scale (Granite, Cohere) commutes
    with a head without bias; a soft cap (Gemma 2) does not.
    """
    head = model.get_output_embeddings()
    if type(head) is not torch.nn.Linear:
        return f"its head is not a plain linear layer ({type(head).__name__})"
    if getattr(model.config, "output_router_logits", False):
        return "a router's loss is added to its loss (model.config.output_router_logits)"
    if head.weight.is_meta:  # without numbers, a tiny model of the same class and settings is tested
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):
            return not_lean(type(model)(shrink(model.config)))
    given: list[torch.Tensor] = []
    draw = torch.Generator().manual_seed(0)

    def replace(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        numbers = torch.linspace(-50, 50, output.numel())[torch.randperm(output.numel(), generator=draw)]
        given.append(numbers.view(output.shape).to(output))
        return given[-1]

    hook, training = head.register_forward_hook(replace), model.training
    try:
        tokens = torch.randint(head.out_features, (2, 6), generator=draw).to(head.weight.device)
        labels = tokens.clone()
        labels[0, :3] = IGNORED  # the rows differ in items
        with torch.no_grad():
            outputs = model.eval()(input_ids=tokens, labels=labels)
        logits, loss = outputs.logits, float(outputs.loss)
    except Exception as error:  # any model, which can raise any error
        return f"its loss cannot be tested ({type(error).__name__}: {one_line(error)[:200]})"
    finally:
        hook.remove()
        model.train(training)
    if len(given) != 1 or given[0].shape != logits.shape:
        return "its logits are not the outputs of its head"
    largest = given[0].argmax()
    scale = float(logits.flatten()[largest] / given[0].flatten()[largest])
    if not torch.allclose(logits.float(), scale * given[0].float(), rtol=1e-2, atol=1e-2 * abs(scale)):
        return "its logits are the outputs of its head after another operation (such as a soft cap)"
    if head.bias is not None and scale != 1:
        return "its head has a bias, and its logits are scaled"
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
    )
    if not math.isclose(loss, float(expected), rel_tol=1e-3):
        return "its loss is not the mean cross-entropy of the next tokens alone"
    return None


@cache
def _forward_of(model_class: type) -> Any:
    """Return the class's forward, which with labels computes the loss in chunks and no logits.

    The signature stays: generate and Trainer read the names of a model's inputs from it.
    """

    @wraps(model_class.forward)  # type: ignore[attr-defined]
    def forward(
        self: Any,
        *args: Any,
        labels: torch.Tensor | None = None,
        num_items_in_batch: Any = None,
        **inputs: Any,
    ) -> Any:
        own = model_class.forward  # type: ignore[attr-defined]
        if labels is None:
            return own(self, *args, **inputs)
        head = self.get_output_embeddings()
        with _passing_through(head):
            hidden = own(self, *args, **inputs).logits  # scaled as logits would be
        return CausalLMOutput(loss=_mean_loss(head, hidden, labels, num_items_in_batch))

    return forward


def _mean_loss(head: Any, hidden: torch.Tensor, labels: torch.Tensor, num_items: Any) -> Any:
    """Return the mean loss over the labelled tokens, or the sum divided by `num_items`."""
    hidden, targets = hidden[..., :-1, :], labels[..., 1:]
    # Labels without values (`memory/estimator.py`): all tokens count, and two chunks stand for all chunks.
    if is_fake(hidden):
        hidden, targets = hidden.flatten(0, -2), targets.flatten()
        rest = len(targets) - 2 * TOKENS_PER_CHUNK
        sizes = [TOKENS_PER_CHUNK, TOKENS_PER_CHUNK, rest] if rest >= 0 else TOKENS_PER_CHUNK
        chunks = zip(hidden.split(sizes)[:2], targets.split(sizes)[:2], strict=True)
    else:
        learned = targets != IGNORED
        hidden, targets = hidden[learned], targets[learned]
        chunks = zip(hidden.split(TOKENS_PER_CHUNK), targets.split(TOKENS_PER_CHUNK), strict=True)
    if not len(targets):
        return hidden.sum() * math.nan  # a mean over no tokens
    losses = [
        checkpoint(_loss, head, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks
    ]
    return torch.stack(losses).sum() / (len(targets) if num_items is None else num_items)  # type: ignore[arg-type]


def _loss(head: torch.nn.Module, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits = head(hidden)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.nn.functional.cross_entropy(logits, targets, reduction="sum")


@contextmanager
def _passing_through(head: torch.nn.Module) -> Iterator[None]:
    """Make the head return its inputs, the hidden states, inside this block."""
    own = vars(head).get("forward")  # for example Accelerate's, if the model is spread over devices
    head.forward = lambda hidden: hidden
    try:
        yield
    finally:
        del head.forward
        if own is not None:
            head.forward = own
