"""`model.teacher`: load a teacher for a recipe, and compare its tokens and labels with the student's.

The teacher gets the student's tokens. So both have one tokenizer, and one list of labels or one vocabulary.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from gradacc_hf.config.schema import with_settings
from gradacc_hf.errors import InputError, listed, refuse
from gradacc_hf.recipe.labels import SHOWN, labels_of_config, match_labels, parameters_of_labels
from gradacc_hf.training.distillation import Distillation
from gradacc_hf.training.settings import LoraConfig
from gradacc_hf.utils.modeling import num_positions

if TYPE_CHECKING:
    from gradacc_hf.recipe.base import Recipe

PROBES = (
    "The Quick brown fox (1995) isn't 3.5 % slower; naïve café, 北京.",
    "def f(x):\n    return x ** 2  # a comment\n\n\tURL: https://example.org/a_b?c=d",
)
"""Texts that tokenizers with one vocabulary may split differently, by case, accents and spaces."""
SAMPLED = 4096
"""Numbers of a weight that its checksum reads."""


class Teacher:
    """The teacher of a recipe: its files, its config and its weights.

    Args:
        recipe: The recipe of the student.

    Raises:
        InputError: In most methods, for a teacher that the student cannot learn from.
    """

    def __init__(self, recipe: "Recipe"):
        settings = recipe.config.model
        self.name = settings.teacher or ""
        changes = {
            "model.name": self.name,
            "model.teacher": None,
            "model.revision": None,
            "model.lora": LoraConfig(),
            "model.freeze": [],
            "model.load_in_4bit": False,
        }
        self.recipe = type(recipe)(with_settings(recipe.config, changes))
        self.recipe.without_weights = recipe.without_weights

    @property
    def config(self) -> Any:
        """The config of the teacher, as it was saved."""
        with _naming_teacher():
            return self.recipe.own_config

    def check(self, student: "Recipe") -> str:
        """Raise InputError if the teacher does not fit the student. Return a line for the plan."""
        if not student.takes_teacher:
            found = f"{type(student).__name__} learns from no teacher"
            refuse("model.teacher", found, "set it to null")
        if student.data.weight_column is not None:
            found = f"found {student.data.weight_column!r} with model.teacher"
            refuse("data.weight_column", found, "set one of the two to null")
        if getattr(student.data, "problem", None) == "regression":
            refuse("data.problem", "found regression with model.teacher, and a number has no classes",
                   "single_label or multi_label, or model.teacher null")  # fmt: skip
        with _naming_teacher():
            tokenizer, own = self.recipe.tokenizer, student.tokenizer
        if tokenizer.get_vocab() != own.get_vocab() or any(
            tokenizer(text)["input_ids"] != own(text)["input_ids"] for text in PROBES
        ):
            found = f"the tokenizer of {self.name} is not the one of {student.config.model.name}"
            refuse("model.teacher", found, "name a teacher with the same tokenizer")
        if "id2label" in student.model_overrides():
            order = self.order(student)
            same = "in the same order" if order == sorted(order) else "reordered by name"
            what = f"its {len(order)} labels {same}"
        else:
            sizes = [c.get_text_config().vocab_size for c in (self.config, student.own_config)]
            if min(sizes) < len(tokenizer):
                found = f"{self.name} has {sizes[0]:,} outputs, and {student.config.model.name} {sizes[1]:,}"
                allowed = f"{len(tokenizer):,} or more, as the tokenizer has: name another teacher"
                refuse("model.teacher", found, allowed)
            what = f"the same {len(tokenizer):,} tokens"
            if sizes[0] != sizes[1]:
                what += f"; one vocabulary is padded to {max(sizes):,}"
        settings = student.config.model
        share = f"{settings.teacher_weight:g} of the loss at temperature {settings.teacher_temperature:g}"
        return f"{self.name}, {share}; {what}"

    def order(self, student: "Recipe") -> list[int]:
        """Return the teacher's id of each label of the student."""
        names = [*student.model_overrides()["id2label"].values()]
        task = student.model_class.__name__.removeprefix("AutoModel")
        own = labels_of_config(self.config, task)
        if own is None:
            found = f"{self.name} has no labels of its own"
            refuse("model.teacher", found, "name a model that was fine-tuned for these labels, or a run")
        if names == own:
            return [*range(len(own))]
        found = match_labels(names, own)
        if found.are_new or len(names) < len(own):
            lists = (listed(some[:SHOWN]) + ", …" * (len(some) > SHOWN) for some in (own, names))
            refuse("model.teacher", "{} has the labels {}, and the data {}".format(self.name, *lists),
                   "name a teacher with the same labels")  # fmt: skip
        return [found.ids[name] for name in names]

    def load(self, student: "Recipe") -> Any:
        """Return the teacher with its weights, and with labels in the student's order."""
        recipe = self.recipe
        with _naming_teacher():
            if recipe.earlier is not None and recipe.earlier.has_adapters and not recipe.without_weights:
                folder = recipe.earlier.model
                lora = LoraConfig(**{"rank": 1, **recipe.earlier.adapter_settings})
                changed = recipe.with_config(with_settings(recipe.config, {"model.lora": lora}))
                model = changed.load(folder)
            else:
                model = _weights(recipe)
        limit, longest = num_positions(model), student.config.data.max_length
        if 0 < limit < longest:
            found = f"{self.name} has {limit:,} positions, and data.max_length is {longest:,}"
            refuse(
                "model.teacher", found, f"set data.max_length to {limit:,} or less, or name another teacher"
            )
        model.config.pad_token_id = getattr(student.tokenizer, "pad_token_id", None)
        if "id2label" in (overrides := student.model_overrides()):
            order = self.order(student)
            if order != sorted(order) and not recipe.without_weights:
                _reorder(recipe.model_class, model, order)
            model.config.id2label, model.config.label2id = overrides["id2label"], overrides["label2id"]
            model.config.problem_type = overrides.get("problem_type")  # of the loss, which is the student's
        return model.to(recipe.dtype).eval().requires_grad_(False)


def make_distillation(student: "Recipe") -> Distillation:
    """Return the loss of a recipe with `model.teacher`."""
    settings = student.config.model
    return Distillation(
        student.teacher.load(student),
        student.loss,
        student.item_logits,
        settings.teacher_temperature,
        settings.teacher_weight,
        student.labels_are_several,
    )


def fingerprint_of_teacher(teacher: Any) -> str:
    """Return a checksum of names, shapes and `SAMPLED` numbers of each weight of a model."""
    digest = hashlib.sha256()
    for name, tensor in sorted(teacher.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().flatten()
        digest.update(flat[:: max(1, flat.numel() // SAMPLED)].cpu().double().numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


def _weights(recipe: "Recipe") -> Any:
    """Return the model of a recipe as it was saved, or without weights on the meta device."""
    options = {"trust_remote_code": recipe.config.model.trust_remote_code}
    config = recipe.own_config
    if recipe.config.budget.attention is not None:
        config._attn_implementation = recipe.config.budget.attention
    if recipe.without_weights:
        with torch.device("meta"):
            return recipe.model_class.from_config(config, dtype=recipe.dtype, **options)
    with recipe.loading_errors("weights"):
        model, info = recipe.model_class.from_pretrained(
            recipe.model_path, config=config, dtype=recipe.dtype, output_loading_info=True, **options
        )
    if missing := sorted(info["missing_keys"]):
        raise InputError(
            f"model.name: {recipe.config.model.name} has no saved weights for {missing[0]}; name a model "
            "that was fine-tuned for this task"
        )
    return model


@torch.no_grad()
def _reorder(model_class: Any, model: Any, order: list[int]) -> None:
    """Put the outputs of a classifier into another order: the number of each output now."""
    options = {"trust_remote_code": True} if type(model).__module__.startswith("transformers_modules") else {}
    names = parameters_of_labels(lambda config: model_class.from_config(config, **options), model.config)
    for name in names:
        parameter = model.get_parameter(name)
        if parameter.shape[0] != len(order):
            raise InputError(
                f"model.teacher: the labels of {type(model).__name__} cannot be reordered: {name} is "
                f"{list(parameter.shape)}; list data.labels in the teacher's order"
            )
        parameter.copy_(parameter[order].clone())


@contextmanager
def _naming_teacher() -> Iterator[None]:
    """Name `model.teacher` in errors about the teacher's files."""
    try:
        yield
    except InputError as error:
        if not str(error).startswith("model.name"):
            raise
        raise InputError("model.teacher" + str(error).removeprefix("model.name")) from error
