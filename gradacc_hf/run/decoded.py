"""Examples as the model receives them, decoded: their texts, and the parts of them that are learned.

The columns of an example are the inputs of transformers' models. They determine what is learned: `labels` as
token ids, tags or classes, and the positions of an answer. The recipe has the names of classes.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gradacc_hf.accumulation.loss_items import IGNORED
from gradacc_hf.recipe.base import Recipe
from gradacc_hf.tasks.images import read_image

TOKENS = "input_ids"
NO_ANSWER = "no answer"


class Piece(NamedTuple):
    """A part of a decoded text.

    text: the text that the model reads.
    learned: the text that the model learns here; None if it learns nothing.
    mark: the tag or the right token, to print after the text.
    """

    text: str
    learned: str | None = None
    mark: str = ""


@dataclass(frozen=True)
class DecodedText:
    """One of the texts of an example: "source" or "target", or "" if there is only one."""

    name: str
    pieces: list[Piece]
    tokens: int

    @property
    def text(self) -> str:
        """The whole text that the model reads."""
        return "".join(piece.text for piece in self.pieces)


@dataclass(frozen=True)
class DecodedExample:
    """An example as the model receives it.

    number: the number of the example in the data set, from 0, as in `data.leave_out`.
    texts: the texts, or one line about other inputs, such as an image.
    labels: the names of the classes, or the number, that the example as a whole has.
    weight: the weight in the loss; None without `data.weight_column`.
    source: the source in a mixture; None for data of one source.
    """

    number: int
    texts: list[DecodedText]
    labels: list[str]
    weight: float | None = None
    source: str | None = None

    @property
    def tokens(self) -> int:
        """The tokens of all texts."""
        return sum(part.tokens for part in self.texts)

    @property
    def learned(self) -> list[str]:
        """Everything that is learned, in order: labels, tags, or texts."""
        pieces = (piece for part in self.texts for piece in part.pieces)
        return self.labels + [piece.learned for piece in pieces if piece.learned is not None]

    def as_json(self) -> dict[str, Any]:
        """Return the example for `gradacc data --json`."""
        texts = {part.name or "text": part.text for part in self.texts}
        found = {"number": self.number, "tokens": self.tokens, "texts": texts, "learned": self.learned}
        return found | {"weight": self.weight, "source": self.source}


def label_names(recipe: Recipe) -> list[str] | None:
    """Return the names of the labels by id; None if labels are not classes. Call it after `datasets()`."""
    overrides = recipe.model_overrides()
    names = overrides.get("id2label")
    if names is None or overrides.get("problem_type") == "regression":
        return None
    return [names[number] for number in sorted(names)]


def is_encoder_decoder(recipe: Recipe) -> bool:
    """Whether the model reads one text and writes another."""
    return bool(getattr(recipe.model_config(), "is_encoder_decoder", False))


def kind_of_labels(recipe: Recipe, example: Mapping[str, Any]) -> str:
    """Return the kind of an example's labels; "" if it has none.

    classes: a class. sets: any number of classes. numbers: a number. tags: a class for tokens. tokens: tokens
    that are learned where they are. targets: tokens to write. answers: an answer or none.
    """
    labels, names = example.get("labels"), label_names(recipe)
    if "start_positions" in example:
        return "answers"
    if labels is None:
        return ""
    if not isinstance(labels, list):
        return "numbers" if names is None else "classes"
    if not all(isinstance(label, int) for label in labels):
        return "" if names is None else "sets"
    if names is not None:
        return "tags"
    return "targets" if is_encoder_decoder(recipe) else "tokens"


def decode_example(
    recipe: Recipe, number: int, example: Mapping[str, Any], raw: Mapping[str, Any], tokens: Sequence[int]
) -> DecodedExample:
    """Return an example as the model receives it.

    Args:
        recipe: The recipe, after a call of `datasets()`.
        number: The number of the example.
        example: The example after the recipe's `transform`.
        raw: The example as `datasets()` returns it.
        tokens: The measured tokens of each input.
    """
    columns = [name for name in example if name.endswith(TOKENS)]
    if not columns:
        line = "; ".join(line for name in raw if (line := _input(name, raw[name], example.get(name))))
        return DecodedExample(
            number, [DecodedText("", [Piece(line)], int(sum(tokens)))], _labels(recipe, example)
        )
    texts = []
    for column in columns:
        name, ids = column.removesuffix(TOKENS).removesuffix("_"), list(example[column])
        pieces = list(_pieces(recipe, example, ids)) if column == TOKENS else [Piece(_decode(recipe, ids))]
        if name == "positive":
            pieces = [Piece(pieces[0].text, pieces[0].text)]
        texts.append(DecodedText(name, pieces, len(ids)))
    if columns == [TOKENS] and kind_of_labels(recipe, example) == "targets":
        written = _decode(recipe, example["labels"])
        target = DecodedText("target", [Piece(written, written)], len(example["labels"]))
        texts = [DecodedText("source", texts[0].pieces, texts[0].tokens), target]
    return DecodedExample(number, texts, _labels(recipe, example))


def _labels(recipe: Recipe, example: Mapping[str, Any]) -> list[str]:
    """Return the names of the classes, or the number, of an example as a whole."""
    names, kind = label_names(recipe) or [], kind_of_labels(recipe, example)
    if kind == "answers" and not answer_tokens(recipe, example):
        return [NO_ANSWER]
    if kind == "sets":
        return [name for name, label in zip(names, example["labels"], strict=True) if label > 0]
    if kind == "classes":
        return [names[int(example["labels"])]]
    return [f"{example['labels']:g}"] if kind == "numbers" else []


def answer_tokens(recipe: Recipe, example: Mapping[str, Any]) -> range:
    """Return the tokens of the answer, without the token that stands for no answer."""
    first, last = example["start_positions"], example["end_positions"]
    special = set(recipe.tokenizer.all_special_ids) - {recipe.tokenizer.unk_token_id}
    has_answer = first >= 0 and not (first == last and example[TOKENS][first] in special)
    return range(first, last + 1) if has_answer else range(0)


def _pieces(recipe: Recipe, example: Mapping[str, Any], ids: Sequence[int]) -> Iterator[Piece]:
    """Yield the parts of a text, the learned ones apart."""
    texts, kind = token_texts(recipe.tokenizer, ids), kind_of_labels(recipe, example)
    labels = example["labels"] if kind in ("tags", "tokens") else []
    if kind == "answers":
        answer = answer_tokens(recipe, example)
        for is_answer, run in groupby(range(len(ids)), key=answer.__contains__):
            text = "".join(texts[token] for token in run)
            yield from _apart(text, text.strip()) if is_answer else [Piece(text)]
    elif len(labels) != len(ids):
        yield Piece("".join(texts))
    elif kind == "tags":
        special, names = set(recipe.tokenizer.all_special_ids), label_names(recipe) or []
        yield from _tagged(texts, labels, names, [token in special for token in ids])
    elif any(label not in (IGNORED, token) for label, token in zip(labels, ids, strict=True)):
        for text, label, token in zip(texts, labels, ids, strict=True):
            right = "" if label == IGNORED else _decode(recipe, [label]).strip()
            yield from _apart(text, right, f"→{right}" * (label != token)) if right else [Piece(text)]
    else:
        for is_ignored, run in groupby(zip(texts, labels, strict=True), lambda pair: pair[1] == IGNORED):
            text = "".join(text for text, _ in run)
            yield Piece(text, None if is_ignored else text)


def _tagged(
    texts: Sequence[str], labels: Sequence[int], names: Sequence[str], is_special: Sequence[bool]
) -> Iterator[Piece]:
    """Yield words with tags. The tokens after the first that continue its word have no label."""
    place = 0
    while place < len(texts):
        text, label = texts[place], labels[place]
        place += 1
        while label != IGNORED and place < len(texts) and labels[place] == IGNORED:
            if is_special[place] or texts[place][:1].isspace():
                break
            text, place = text + texts[place], place + 1
        tag = "" if label == IGNORED else names[label]
        yield from _apart(text, f"{text.strip()}/{tag}", f"/{tag}") if tag else [Piece(text)]


def _apart(text: str, learned: str, mark: str = "") -> Iterator[Piece]:
    """Yield the white space around a learned text, and the text."""
    inside = text.strip()
    before = text[: len(text) - len(text.lstrip())] if inside else text
    yield from [Piece(before)] if before else []
    yield Piece(inside, learned, mark)
    yield from [Piece(after)] if (after := text[len(before) + len(inside) :]) else []


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Return the text that each token adds. A character of several tokens belongs to the last of them."""
    texts, begin, done = [], 0, 0
    for end in range(1, len(ids) + 1):  # the token before decides on spaces
        before, now = (_decoded(tokenizer, ids[begin:stop]) for stop in (done, end))
        if now.endswith("\ufffd") and end < len(ids):
            texts.append("")
            continue
        texts.append(now[len(before) :])
        begin, done = done, end
    return texts


def _decode(recipe: Recipe, ids: Sequence[int]) -> str:
    return _decoded(recipe.tokenizer, [token for token in ids if token != IGNORED])


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _input(name: str, raw: Any, seen: Any) -> str:
    """Return a line about an input that has no tokens; "" for labels and flags."""
    if isinstance(raw, dict) and {"bytes", "path"} <= {*raw}:
        image = read_image(raw)
        file = "/".join(Path(raw["path"]).parts[-2:]) if raw["path"] else name  # with the folder of a class
        return f"{file}, {image.width} × {image.height} pixels"
    values: Any = raw if seen is None else seen
    shape = np.shape(values)
    return f"{name}: {' × '.join(map(str, shape))} numbers" if shape and name != "labels" else ""
