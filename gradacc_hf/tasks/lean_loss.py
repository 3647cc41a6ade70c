"""`budget.lean_loss`: vocabulary logits only at labelled positions, in the recipes of language models.

`padding/logits.py` changes the model.
"""

from typing import Any, Literal

import torch

from gradacc_hf.errors import LogitsNeededError, refuse
from gradacc_hf.padding.logits import check_logits, install, skip_unlabelled_logits
from gradacc_hf.verification.tiny_models import shrink


def make_lean(model: Any, setting: bool | Literal["auto"] = "auto") -> bool:
    """Make a language model compute logits only at labelled positions, if its loss allows it.

    With labels, the outputs then hold no logits. Without labels (generation), the logits do not change.

    Args:
        model: The model. Its `forward` is replaced. Without weights, a tiny model of the same class
            and settings is checked.
        setting: "auto": if the loss allows it; False: never; True: always.

    Returns:
        Whether the model computes its loss from few logits now.

    Raises:
        InputError: If `setting` is True and the loss does not allow it.
    """
    if setting is False:
        return False
    try:
        if any(parameter.is_meta for parameter in model.parameters()):
            with torch.device("cpu"), torch.random.fork_rng(devices=[]):
                start = {"decoder_start_token_id": 0} if model.config.is_encoder_decoder else {}
                check_logits(type(model)(shrink(model.config, start)))
            install(model)
        else:
            skip_unlabelled_logits(model)
    except LogitsNeededError as error:
        if setting is True:
            refuse("budget.lean_loss", f"found true, but {error}", "allowed here: auto or false")
        return False
    return True
