"""The loss of a causal language model without its logits: they are never whole in memory.

Logits are tokens × vocabulary, by far the largest tensor of a small model with a large vocabulary.
`make_lean` has the model compute them for a few hundred tokens at a time, forward and again in the backward
pass (torch.utils.checkpoint), and only for tokens that are learned. The mathematics are unchanged: the
gradient is that of the model's own loss, to rounding.

Torch 2.13's linear_cross_entropy does the same with the gradient computed ahead; it is not used because its
loss comes in the precision of its inputs (11.625 for 11.507 in bf16) and older versions lack it.
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

TOKENS_PER_CHUNK = (
    256  # tokens whose logits are in memory at a time: 50 MB at a vocabulary of 49,152, in float32
)


def make_lean(model: Any, setting: bool | Literal["auto"] = "auto") -> bool:
    """Make a causal language model compute its loss in chunks, where its logits allow it.

    With labels, the outputs then hold the loss alone. Without labels (generation), logits are as before.

    Args:
        setting: "auto": where the logits allow it; False: never; True: always.

    Returns:
        Whether the model computes its loss in chunks now.

    Raises:
        InputError: with `setting` True, where the logits do not allow it.
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
    """Why the loss cannot be had from the hidden states and the head alone; None where it can.

    The model is asked rather than its type: numbers are put in place of what its head gives, must come out as
    its logits, and its loss must be their cross-entropy with the next tokens. A constant scale (Granite,
    Cohere) commutes with a head without bias; a soft cap (Gemma 2) does not.
    """
    head = model.get_output_embeddings()
    if type(head) is not torch.nn.Linear:
        return f"its head is no plain linear layer ({type(head).__name__})"
    if getattr(model.config, "output_router_logits", False):
        return "a router's loss is added to it (model.config.output_router_logits)"
    if head.weight.is_meta:  # no numbers to ask with: a tiny model of the same class and switches is asked
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
    except Exception as error:  # a model of any kind, which may raise anything
        return f"it cannot be asked for its loss ({type(error).__name__}: {one_line(error)[:200]})"
    finally:
        hook.remove()
        model.train(training)
    if len(given) != 1 or given[0].shape != logits.shape:
        return "its logits are not what its head gives"
    largest = given[0].argmax()
    scale = float(logits.flatten()[largest] / given[0].flatten()[largest])
    if not torch.allclose(logits.float(), scale * given[0].float(), rtol=1e-2, atol=1e-2 * abs(scale)):
        return "what its head gives is changed further (a soft cap, say) before it is called logits"
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
    """The class's own forward, but for its logits and loss where there are labels.

    Its signature stays, by which generate and Trainer find out what a model takes.
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
    """The mean over the learned tokens, or their sum divided by `num_items`."""
    hidden, targets = hidden[..., :-1, :], labels[..., 1:]
    # Labels without values (`memory/estimator.py`): all are learned, and two chunks tell of all.
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
        return hidden.sum() * math.nan  # a mean over nothing
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
    """In this block the head gives what it is given: the hidden states."""
    own = vars(head).get("forward")  # Accelerate's, say, where the model is spread over devices
    head.forward = lambda hidden: hidden
    try:
        yield
    finally:
        del head.forward
        if own is not None:
            head.forward = own
