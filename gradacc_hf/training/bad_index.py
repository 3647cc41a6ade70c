"""Token ids, positions and labels that a model has no row for.

PyTorch reports such an id as "index out of range in self", and on a GPU as a failed assertion.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from traceback import walk_tb
from types import TracebackType
from typing import Any

import torch

from gradacc_hf.errors import InputError

CURE = (
    "the tokenizer has tokens that the model lacks: model.resize_token_embeddings(len(tokenizer)) before the "
    "optimizer is made, or the tokenizer of the model"
)


def num_embeddings(model: Any) -> int | None:
    """Return the rows of the input embeddings of a transformers model; None if there are none.

    A model of images or sound may mark their places by ids without a row.
    """
    config = getattr(model, "config", None)
    if hasattr(config, "vision_config") or hasattr(config, "audio_config"):
        return None
    try:
        embeddings = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # images, or another module
        return None
    return embeddings.num_embeddings if isinstance(embeddings, torch.nn.Embedding) else None


def num_outputs(model: Any) -> int | None:
    """Return the tokens that a transformers model has logits for; None without a head for tokens."""
    head = model.get_output_embeddings()
    return None if getattr(head, "weight", None) is None else len(head.weight)


def ids_beyond(batch: Mapping[str, Any], rows: int) -> str | None:
    """Return a line about the first token id of a batch that is not from 0 to rows − 1; None if all are."""
    for name, ids in batch.items():
        of_decoder = name.startswith("decoder_")  # its embeddings may be others
        if not name.endswith("input_ids") or of_decoder or not isinstance(ids, torch.Tensor):
            continue
        wrong = ids[(ids < 0) | (ids >= rows)]
        if wrong.numel():
            found = f"{name} has the id {int(wrong[0])}, and the model has the ids 0 to {rows - 1}"
            return f"{found}; {CURE if wrong[0] >= 0 else 'only labels have -100'}"
    return None


@contextmanager
def name_bad_index(model: torch.nn.Module) -> Iterator[None]:
    """Turn the IndexError of an embedding or a loss into an InputError with the module and the id."""
    try:
        yield
    except IndexError as error:
        if (found := _explained(error.__traceback__, model)) is None:
            raise
        raise InputError(found) from error
    except RuntimeError as error:
        if "device-side assert" not in str(error):
            raise
        raise InputError(
            "model: a token id, a position or a label is beyond the rows of the model. A GPU does not name "
            "it; run the same on the CPU to find it"
        ) from error


def _explained(traceback: TracebackType | None, model: torch.nn.Module) -> str | None:
    for frame, _ in walk_tb(traceback):
        module, name = frame.f_locals.get("self"), frame.f_code.co_name
        ids, targets = frame.f_locals.get("input"), frame.f_locals.get("target")
        if not isinstance(ids, torch.Tensor):
            continue
        if isinstance(module, torch.nn.Embedding):
            return _of_embedding(module, ids, model)
        if name in ("cross_entropy", "nll_loss") and isinstance(targets, torch.Tensor):
            classes = ids.shape[1] if ids.ndim > 1 else len(ids)
            wrong = targets[((targets < 0) | (targets >= classes)) & (targets != -100)]
            label = int(wrong[0]) if wrong.numel() else int(targets.max())
            return (
                f"labels: the loss has the label {label}, and the model has {classes} outputs; allowed: 0 to "
                f"{classes - 1}, and -100 for no label"
            )
    return None


def _of_embedding(module: torch.nn.Embedding, ids: torch.Tensor, model: torch.nn.Module) -> str | None:
    rows = module.num_embeddings
    wrong = ids[(ids < 0) | (ids >= rows)]
    if not wrong.numel():
        return None
    name = next((name for name, found in model.named_modules() if found is module), "an embedding")
    found = f"model: {name} has the rows 0 to {rows - 1}, and the batch has {int(wrong[0])}"
    if wrong[0] < 0:
        return f"{found}; an id is 0 or more, and only labels have -100"
    if re.search(r"pos|wpe", name):
        return f"{found}; the model has too few positions: shorten the examples"
    inputs = [one for one in model.modules() if hasattr(one, "get_input_embeddings")]
    of_tokens = any(num_embeddings(one) == rows for one in inputs)
    return f"{found}; {CURE}" if of_tokens else f"{found}; change the examples, or enlarge the embedding"
