"""A score for each row of a batch: the log-probability of an answer, or the score of a reward model.

`score_rows` changes a language model, so that `loss` of the outputs is the log-probability of the labelled
tokens of each row (rows,). Vocabulary logits are computed only there, if `padding/logits.py` allows it. A
reward model has one logit for each row.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch._subclasses.fake_tensor import is_fake
from torch.nn.functional import cross_entropy

from gradacc_hf.accumulation.loss_items import IGNORED
from gradacc_hf.errors import InputError
from gradacc_hf.training.lora import pretrained

ROWS = ("input_ids", "attention_mask", "labels")
"""The tensors of a batch that hold its rows."""
KL_ROWS = tuple(f"kl_{name}" for name in ROWS)
"""The same for answers to other prompts (KTO)."""
REFERENCE, TOKENS = "reference", "answer_tokens"
"""Reference log-probabilities, and numbers of answer tokens (examples, answers of an example)."""


def rows_of(batch: Mapping[str, Any], names: tuple[str, ...] = ROWS) -> dict[str, Any]:
    """Return the rows of a batch under the names in `ROWS`."""
    return {name: batch[own] for name, own in zip(ROWS, names, strict=True) if own in batch}


def scores_of(outputs: Any) -> torch.Tensor:
    """Return the score of each row, in float32 at least (rows,)."""
    scores = getattr(outputs, "loss", None)
    scores = outputs.logits[:, 0] if scores is None else scores
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


def score_rows(model: Any, loss: Any = None, with_labels: bool = True) -> None:
    """Make a model compute the score of each row of a batch, in place.

    Args:
        model: A transformers model, or a model around one.
        loss: A `KtoLoss`, whose forward computes answers to other prompts where z is not known.
        with_labels: Whether the model gets the labels, as a language model does.
    """
    inner = pretrained(model)
    if with_labels:
        inner.loss_function = log_probabilities
    inner.register_forward_pre_hook(_ModelInputs(loss, with_labels), with_kwargs=True)


def log_probabilities(logits: Any, labels: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """Return the log-probability of the labelled tokens of each row (rows,).

    It takes the place of the loss function of a model in transformers.

    Args:
        logits: Logits of a causal model (rows, tokens, vocabulary).
        labels: Token ids, −100 for tokens that do not count (rows, tokens).
    """
    target, rows = labels[:, 1:].flatten(), len(labels)
    logits = logits[:, :-1].flatten(0, 1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if is_fake(labels):  # a prediction of memory: a mean needs no logits of all tokens
        return -cross_entropy(logits, target, ignore_index=IGNORED).expand(rows)
    each = cross_entropy(logits, target, ignore_index=IGNORED, reduction="none")
    return -each.view(rows, -1).sum(1)


class _ModelInputs:
    """A hook that gives the model the rows of a batch, and nothing else of the batch."""

    def __init__(self, loss: Any, with_labels: bool):
        self.loss, self.with_labels = loss, with_labels

    def __deepcopy__(self, memo: dict) -> "_ModelInputs":
        return self  # the loss of a run is also the loss of copies of a model

    def __call__(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        kept = {name: value for name, value in kwargs.items() if name not in _BESIDE_ROWS}
        if not self.with_labels:
            kept.pop("labels", None)
        elif kept.get("labels") is not None:
            if KL_ROWS[0] in kwargs and not self.loss.knows_point and not is_fake(kwargs[KL_ROWS[0]]):
                kept |= _joined(kept, rows_of(kwargs, KL_ROWS), module.config.pad_token_id or 0)
            if "use_cache" in inspect.signature(module.forward).parameters:
                kept["use_cache"] = False
        return args, kept


_BESIDE_ROWS = {*KL_ROWS, REFERENCE, TOKENS, "desirable"}


def _joined(rows: Mapping[str, Any], others: Mapping[str, Any], pad: int) -> dict[str, torch.Tensor]:
    """Return two batches of rows as one, padded to the longer."""
    width = max(batch["input_ids"].shape[1] for batch in (rows, others))
    found = {}
    for name, filler in zip(ROWS, (pad, 0, IGNORED), strict=True):
        parts = [
            torch.nn.functional.pad(b[name], (0, width - b[name].shape[1]), value=filler)
            for b in (rows, others)
        ]
        found[name] = torch.cat(parts)
    return found


def check_scores(model: Any, name: str) -> None:
    """Raise InputError if a language model does not compute its loss with transformers' `loss_function`."""
    config = model.config
    if next(model.parameters()).is_meta:
        return
    training, device = model.training, model.device
    tokens = torch.zeros((2, 3), dtype=torch.long, device=device)
    with torch.no_grad():
        found = model.eval()(input_ids=tokens, labels=tokens).loss
    model.train(training)
    if not isinstance(found, torch.Tensor) or found.shape != (2,):
        raise InputError(
            f"model.name: {name} ({type(model).__name__}, {config.model_type}) computes its own loss, so the "
            "log-probabilities of answers are not known; name a model that uses transformers' loss_function"
        )
