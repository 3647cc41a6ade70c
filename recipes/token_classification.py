"""Tag every token of a text: named entities, parts of speech, or the roles of names in source code.

    ./launch.sh recipes/token_classification.py --config configs/token_classification_offline.yaml

Your own rows: `--data.train my.jsonl`, such as {"tokens": ["Ada", "sang"], "tags": ["B-PER", "O"]}. Also
CoNLL files, and character spans of texts (recipes/README.md, "Formats").
"""

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import ClassVar

import numpy as np
from transformers import AutoModelForTokenClassification

from gradacc_hf.accumulation.loss_items import IGNORED
from gradacc_hf.config import DataConfig
from gradacc_hf.data.columns import class_names, file_rows, labels_as_text, require_fast
from gradacc_hf.data.files import FAULT
from gradacc_hf.data.reading import tokens_lost
from gradacc_hf.data.sources import CARRIED
from gradacc_hf.errors import refuse
from gradacc_hf.metrics.sequence_labelling import is_scheme
from gradacc_hf.recipe import Recipe
from gradacc_hf.recipe.labels import given_labels, match_labels
from gradacc_hf.run import run
from gradacc_hf.tasks.details import class_tables, entity_tables
from gradacc_hf.tasks.tags import (
    OF_SPANS,
    as_tokens,
    check_tokens_and_tags,
    entities,
    ignored_note,
    row_problem,
    split_words,
    tag_names,
)


def features(rows, tokenizer, columns, names, ids, max_length, in_training):
    """Return the inputs of the model: the first word piece of a token has the tag, the others have −100."""
    tokens, tags = (rows[column] for column in columns)
    pairs = zip(tokens, tags, strict=True)
    faults = rows[FAULT] if FAULT in rows else [None] * len(tokens)
    problems = [
        fault or row_problem(*pair, ids, names, in_training) or ""
        for fault, pair in zip(faults, pairs, strict=True)
    ]
    tags = [labels_as_text(row, names) for row in tags]
    tokens = [[] if problem else row for problem, row in zip(problems, tokens, strict=True)]
    settings = {"truncation": True, "max_length": max_length, "return_token_type_ids": False}
    encoded, labels = tokenizer(tokens, is_split_into_words=True, **settings), []
    for row, of_row in enumerate(tags):
        starts = first_pieces(encoded.word_ids(row))
        labels.append([IGNORED if token is None else ids.get(of_row[token], IGNORED) for token in starts])
        if not problems[row] and set(labels[-1]) == {IGNORED}:
            problems[row] = f"no token of its {len(of_row)} is left by data.max_length {max_length}"
    lost = tokens_lost(tokenizer, [tokens], encoded, max_length, is_split_into_words=True)
    left = [sum(label != IGNORED for label in row) for row in labels]
    of_labels = [len(row) - n if cut else 0 for row, n, cut in zip(tags, left, lost, strict=True)]
    return {**encoded, "labels": labels, "problem": problems, "lost_tokens": lost, "lost_labels": of_labels}


def first_pieces(tokens):
    """Return, for each word piece, the number of the token that it begins; None if it begins no token."""
    return [None if token == before else token for before, token in pairwise([None, *tokens])]


class TokenClassification(Recipe):
    """Tag every token of a text."""

    model_class = AutoModelForTokenClassification
    padding_side = "right"
    pipeline_tag = "token-classification"
    takes_teacher = True
    baseline_is = "each token's most frequent tag"
    example = "import os ; print ( os . getcwd ( ) )"
    of_spans = False  # whether the data are character spans of texts
    tokenizer_settings: ClassVar = {"add_prefix_space": True}  # where spaces are part of word pieces

    @dataclass
    class Data(DataConfig):
        tokens_column: str = "tokens"
        """Column of the tokens.
        Each row has a list of strings. In a CoNLL file: the name or the number, from 1, of the column."""
        tags_column: str = "tags"
        """Column of the tags, one for each token.
        Each row has a list of strings, whole numbers or class ids. In a CoNLL file: as for tokens_column."""
        labels: str | list[str] | None = None
        """All tags in order, such as O,B-PER,I-PER.
        null: found in the training rows. data.streaming needs them, unless the file has class names."""

    def datasets(self):
        data = self.data
        require_fast(self.tokenizer, self.config.model.name)
        columns = (data.tokens_column, data.tags_column)
        convert = partial(as_tokens, tokens_column=columns[0], tags_column=columns[1])
        splits = self.rows(data.tags_column, convert, word_columns=columns)
        self.of_spans = any(line.startswith(OF_SPANS) for line in self.reading.notes.get("format", ()))
        self.reading.use([*columns, FAULT])
        for dataset in splits:
            check_tokens_and_tags(dataset, data.tokens_column, data.tags_column)
        self.class_names, given = class_names(splits[0], data.tags_column), given_labels(data.labels)
        if data.streaming and not (self.class_names or given):
            found = "found null, and a stream shows no tag before its row"
            refuse("data.labels", found, "list all tags, such as --data.labels O,B-PER,I-PER")
        key = None if self.class_names or given else "data.tags_column"
        self.labels = match_labels(given or tag_names(splits[0], data.tags_column), self.own_labels, key)
        self.note_labels(self.labels)
        if text := ignored_note(splits, data.tags_column):
            self.reading.note("ignored", text)
        train, validation = self.tokenize(splits[0], True), self.tokenize(splits[1], False)
        numbers, problem = [file_rows(dataset) for dataset in splits], lambda row: row["problem"] or None
        found = self.check_rows(train, validation, problem, "data.tags_column", numbers)
        return tuple(dataset.remove_columns("problem") for dataset in self.note_truncated(found))

    def examples_of(self, rows):
        return features(rows, names=self.class_names, **self.settings(in_training=True))

    def settings(self, in_training):
        """Return the arguments of `features`, without the names of class ids."""
        data = self.data
        settings = {"columns": (data.tokens_column, data.tags_column), "max_length": data.max_length}
        return settings | {
            "in_training": in_training,
            "ids": self.labels.ids,
            "tokenizer": self.tokenizer,
        }

    def tokenize(self, dataset, in_training):
        settings = self.settings(in_training)
        settings["names"] = class_names(dataset, self.data.tags_column)
        removed = [name for name in dataset.column_names if name not in CARRIED]
        return dataset.map(features, batched=True, fn_kwargs=settings, remove_columns=removed)

    def model_overrides(self):
        return self.labels.model_overrides()

    def predict(self, outputs, batch):
        """Return predicted and true ids of the labelled tokens, row by row."""
        rows = zip(outputs.logits.argmax(-1).cpu().numpy(), batch["labels"].cpu().numpy(), strict=True)
        pairs = [(predicted[true != IGNORED], true[true != IGNORED]) for predicted, true in rows]
        return [predicted for predicted, _ in pairs], [true for _, true in pairs]

    def metrics(self, predictions, references):
        from gradacc_hf.metrics import load  # slow to import, so not before it is needed

        scores = {}
        if is_scheme(self.labels.names):  # tags of parts of speech mark no entities
            names = np.array(self.labels.names)
            tags = {"predictions": predictions, "references": references}
            tags = {name: [names[row].tolist() for row in rows] for name, rows in tags.items()}
            scores |= load("seqeval").compute(**tags)
        tokens = {"predictions": np.concatenate(predictions), "references": np.concatenate(references)}
        scores |= load("accuracy").compute(**tokens)
        return scores | {"token_f1": load("f1").compute(**tokens)["f1"]}

    def describe(self, predictions, references, windows):
        """Return tables of the entities and of the tags of tokens."""
        names, pairs = np.array(self.labels.names), (predictions, references)
        tags = [[names[row].tolist() for row in rows] for rows in pairs]
        of_tags = class_tables(self.labels.names, *map(np.concatenate, pairs), of_tokens=True)
        return (entity_tables(*tags) if is_scheme(self.labels.names) else []) + of_tags

    def model(self):
        """Return the model. After training on character spans, a config states how a text is split."""
        model = super().model()
        if self.of_spans:
            model.config.tokens_are_words = True
        return model

    def example_of(self, row):
        return " ".join(row[self.data.tokens_column])

    def answer(self, model, inputs):
        """Return the tags of tokens, and the entities.

        A text is split into tokens at white space, or into words if the training rows were character spans.
        """
        answers, column = [], self.data.tokens_column
        for given in inputs:
            tokens, places = given.get(column, given.get("text")) if isinstance(given, Mapping) else given, []
            if isinstance(tokens, str) and getattr(model.config, "tokens_are_words", False):
                places = split_words(tokens)
                tokens = [tokens[start:end] for start, end in places]
            tokens = tokens.split() if isinstance(tokens, str) else tokens
            is_list = bool(tokens) and isinstance(tokens, list)
            if not is_list or not all(isinstance(token, str) for token in tokens):
                refuse("input", f"found {given!r}", f'a text, or {{"{column}": ["a", "b"]}}')
            tags = self.tag(model, tokens)
            answers.append({"tokens": tokens, "tags": tags, "entities": entities(tokens, tags, places)})
        return answers

    def tag(self, model, tokens):
        """Return a tag for each token. Tokens beyond data.max_length form further rows."""
        settings = {"truncation": True, "max_length": self.data.max_length, "return_overflowing_tokens": True}
        settings |= {"padding": True, "return_tensors": "pt", "return_token_type_ids": False}
        batch = self.tokenizer([tokens], is_split_into_words=True, **settings)
        del batch["overflow_to_sample_mapping"]
        predicted, tags = model(**batch.to(model.device)).logits.argmax(-1).tolist(), {}
        for row, ids in enumerate(predicted):
            for word, tag in zip(batch.word_ids(row), ids, strict=True):
                tags.setdefault(word, model.config.id2label[tag])  # the tag of its first word piece
        return [tags.get(word, "O") for word in range(len(tokens))]  # some tokens have no word piece

    def baseline(self, train, validation):
        """Return the scores of each token's most frequent tag; a new token gets the most frequent of all."""
        of_token, of_all = defaultdict(Counter), Counter()
        for word, tag in (pair for example in train for pair in self.words(example)):
            of_token[word][tag] += 1
            of_all[tag] += 1
        best = {word: counts.most_common(1)[0][0] for word, counts in of_token.items()}
        pairs = [list(self.words(example)) for example in validation]
        predicted = [[best.get(word, of_all.most_common(1)[0][0]) for word, _ in row] for row in pairs]
        return self.metrics(predicted, [[tag for _, tag in row] for row in pairs])

    def words(self, example):
        """Yield the tokens of an example, as tuples of word pieces, with their tags."""
        ids, labels = np.array(example["input_ids"]), np.array(example["labels"])
        special = {*self.tokenizer.all_special_ids} - {self.tokenizer.unk_token_id}  # an unknown token counts
        ids, labels = (values[~np.isin(ids, list(special))] for values in (ids, labels))
        starts = np.flatnonzero(labels != IGNORED).tolist()
        for start, end in pairwise([*starts, len(ids)]):
            yield tuple(ids[start:end].tolist()), int(labels[start])


if __name__ == "__main__":
    run(TokenClassification)
