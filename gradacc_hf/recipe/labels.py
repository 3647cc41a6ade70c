"""The labels of a data set, in the order and with the names that the user's model has for them.

A model with other labels gets a new head.
"""

import copy
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gradacc_hf.accumulation.loss_items import IGNORED
from gradacc_hf.data.columns import as_list
from gradacc_hf.errors import listed, refuse

SHOWN = 6  # label names of a message
USUAL_IGNORED = 255
"""The label that marks what has no label in many data sets."""


@dataclass(frozen=True)
class Labels:
    """The labels of a model that is trained on a data set.

    Attributes:
        names: Names in the config of the model, by id.
        ids: Label in the data → id.
        note: A line about the labels for the plan of a run, or None.
        are_new: Whether the model has labels of its own, and the data have others. The head is then new.
    """

    names: list[str]
    ids: dict[str, int]
    note: str | None = None
    are_new: bool = False

    @property
    def in_data(self) -> list[str]:
        """The labels as the data has them, by id. A label that only the model has keeps the model's name."""
        names = list(self.names)
        for name, number in self.ids.items():
            names[number] = name
        return names

    def model_overrides(self) -> dict[str, Any]:
        """Return the settings of the model's config."""
        return {
            "id2label": dict(enumerate(self.names)),
            "label2id": {name: i for i, name in enumerate(self.names)},
        }


def given_labels(names: str | Sequence[str] | None) -> list[str]:
    """Return the names in data.labels as a list. Raise InputError for a name that is there twice."""
    found = as_list(names)
    if len({*found}) < len(found):
        refuse("data.labels", f"found {listed(found)}", "name each label once")
    return found


def match_labels(found: Sequence[str], own: Sequence[str] | None, key: str | None = None) -> Labels:
    """Return the labels of a model for a data set. The model's own labels stay if the data have no others.

    Labels match by name, or by name without case, if that is unambiguous. Whole numbers are ids of the model,
    if the highest is the model's highest id.

    Args:
        found: The labels of the data, in the order of the data.
        own: The names in the config of the model, by id; None if the model has no labels.
        key: The setting of the labels, for a message about a whole number apart; None if they are names.

    Raises:
        InputError: One of the labels is 255, and the others are 0 to n.
    """
    as_found = {name: number for number, name in enumerate(found)}
    if own is None:
        return Labels(list(found), as_found, f"of the data: {_some(found)}{_note_apart(found, key)}")
    ids = _by_name(found, own) or _by_name(*map(_folded, (found, own))) or _by_id(found, len(own))
    if ids is None:
        note = f"{_some(found)}, instead of the model's own: {_some(own)}{_note_apart(found, key)}"
        return Labels(list(found), as_found, note, are_new=True)
    note = f"the model's own, in the model's order: {_some(own)}"
    if len(found) < len(own):
        note += f"; the data has {len(found)} of these {len(own)}"
    of_data = dict(zip(found, ids, strict=True))
    renamed = [name for name, number in of_data.items() if name != own[number]]
    if renamed:
        note += f"; in the data: {_some([f'{name} = {own[of_data[name]]}' for name in renamed])}"
    return Labels(list(own), of_data, note)


def labels_of_config(config: Any, task: str) -> list[str] | None:
    """Return the label names in a model's saved config; None if they are a default and no head has them.

    Args:
        config: The config as it was saved.
        task: The end of the name of a model class with a head for the task: "ForSequenceClassification".
    """
    names: Mapping[int, str] = getattr(config, "id2label", None) or {}
    if sorted(names) != list(range(len(names))) or not names:
        return None
    has_head = any(task in name for name in getattr(config, "architectures", None) or ())
    own = [str(names[number]) for number in range(len(names))]
    is_default = own == [f"LABEL_{number}" for number in range(len(own))]
    return None if is_default and not has_head else own


def parameters_of_labels(make: Callable[[Any], torch.nn.Module], config: Any) -> set[str]:
    """Return the names of the parameters whose size depends on the number of labels.

    Args:
        make: Returns a model for a config.
        config: The config of the model.
    """
    wider, sizes = copy.deepcopy(config), []
    wider.num_labels = config.num_labels + 1
    for each in (config, wider):
        with torch.device("meta"):
            sizes.append({name: p.shape for name, p in make(each).named_parameters()})
    return {name for name, size in sizes[0].items() if size != sizes[1][name]}


@torch.no_grad()
def renew(model: Any, names: Collection[str]) -> None:
    """Draw new values for the modules of a transformers model that have these parameters."""
    for module in {model.get_submodule(name.rpartition(".")[0]) for name in names}:
        for parameter in module.parameters(recurse=False):
            parameter._is_hf_initialized = False  # else transformers keeps the values
        model._init_weights(module)


def _by_name(found: Sequence[str], own: Sequence[str]) -> list[int] | None:
    known = {name: number for number, name in enumerate(own)}
    is_clear = len({*found}) == len(found) and len(known) == len(own)
    return [known[name] for name in found] if is_clear and {*found} <= {*known} else None


def _by_id(found: Sequence[str], size: int) -> list[int] | None:
    if not all(re.fullmatch(r"0|[1-9]\d*", name) for name in found):
        return None
    numbers = [int(name) for name in found]
    return numbers if max(numbers) == size - 1 else None


def _note_apart(found: Sequence[str], key: str | None) -> str:
    """Return a line about a whole number apart from the others, which are 0 to n, or ""."""
    others = {str(number) for number in range(len(found) - 1)}
    apart = [name for name in found if name not in others]
    is_number = len(apart) == 1 and re.fullmatch(r"-?[1-9]\d*", apart[0])
    if key is None or not is_number or len(others) < 2 or int(apart[0]) == len(others):
        return ""
    [number] = apart
    if int(number) == USUAL_IGNORED:
        refuse(
            key,
            f"the labels are 0 to {len(others) - 1} and {number}, the usual mark of a missing label",
            f"write {IGNORED} where there is no label, or a name such as c{number} if it is a class",
        )
    return f"; {number} is learned as a class ({IGNORED} would mark a missing label)"


def _folded(names: Sequence[str]) -> list[str]:
    """Return names without case, and with one space for any spaces, hyphens or underscores inside."""
    return [re.sub(r"(?<=\w)[\s_-]+(?=\w)", " ", name.strip()).casefold() for name in names]


def _some(names: Sequence[str]) -> str:
    more = f", … ({len(names)})" if len(names) > SHOWN else ""
    return listed(names[:SHOWN]) + more
