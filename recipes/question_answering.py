"""Answer a question with a span of a text, or with no answer (extractive, as in SQuAD 1.1 and 2.0).

    ./launch.sh recipes/question_answering.py --config configs/question_answering_offline.yaml --budget auto

Your own: `--data.train my.jsonl`, rows with `question`, `context` and `answers`:
{"text": ["a span of the context"], "answer_start": [41]}, in characters; or SQuAD's files as published. A
context longer than `data.max_length` is split into overlapping parts. Training uses the parts with the
answer; the best span of all parts is the model's answer. With questions without an answer, training uses
all parts. A threshold, found on validation rows, decides between the span and no answer.
"""

import re
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from typing import ClassVar

import numpy as np
import torch
from transformers import AutoModelForQuestionAnswering

from gradacc_hf.accumulation.loss_items import IGNORED
from gradacc_hf.config import DataConfig
from gradacc_hf.data.columns import require_column
from gradacc_hf.data.sources import CARRIED
from gradacc_hf.errors import InputError
from gradacc_hf.recipe import Recipe, ScoredRows
from gradacc_hf.run import run
from gradacc_hf.tasks.spans import (
    above_no_answer,
    add_positions,
    answers_or_none,
    best_of_rows,
    best_spans,
    check_tokenizer,
    context_logits,
    find_answer,
    in_parts,
    point_at_no_answer,
    row_problem,
    unused,
    with_held,
)
from gradacc_hf.tasks.squad import TITLE, as_questions, has_no_answer, no_answer_note


def features(rows, numbers, question, context, answers, **settings):
    """Return the inputs of the model, and for each example the row and the positions of the tokens."""
    parts = in_parts(rows[question], rows[context], **settings)
    add_positions(parts, rows[answers])
    kept = {name: [rows[name][row] for row in parts["row"]] for name in CARRIED if name in rows}
    return {**parts, **kept, "row": [numbers[row] for row in parts["row"]]}


class QuestionAnswering(Recipe):
    """Answer a question with a span of a text."""

    model_class = AutoModelForQuestionAnswering
    padding_side = "right"  # the left would move the answers' positions
    pipeline_tag = "question-answering"
    baseline_is = "the first sentence of each context, or no answer"
    no_answer = False  # whether the data have questions without an answer
    example: ClassVar = {"question": "What is it?", "context": "def total(items):\n    return sum(items)"}

    @dataclass
    class Data(DataConfig):
        question_column: str = "question"
        """Column of the question."""
        context_column: str = "context"
        """Column of the text that holds the answer."""
        answers_column: str = "answers"
        """Column of the answers, in SQuAD's form.
        {"text": [...], "answer_start": [...]}, with positions in characters."""
        doc_stride: int = 64
        """Tokens shared by two parts of a long context.
        A shorter answer is whole in one of the parts."""
        max_answer_length: int = 30
        """Tokens of the longest answer."""

        def rules(self):
            yield from super().rules()
            yield "doc_stride", 0 <= self.doc_stride < self.max_length, "0 tokens or more, below max_length"
            yield "max_answer_length", self.max_answer_length >= 1, "1 token or more"

    @property
    def columns(self):
        return {name: getattr(self.data, f"{name}_column") for name in ("question", "context", "answers")}

    def datasets(self):
        check_tokenizer(self.tokenizer, self.config.model.name)
        together = (TITLE, self.data.context_column)
        rows = self.rows(convert=partial(as_questions, **self.columns), together=together)
        self.reading.use([*self.columns.values(), "id"])
        for name, column in self.columns.items():
            for dataset in rows:
                require_column(dataset, column, f"data.{name}_column")
        rows = self.check_rows(*rows, self.problem, "data.train")
        parts = [self.tokenize(dataset) for dataset in rows]
        marked = [with_held(*found) for found in zip(rows, parts, strict=True)]
        kept = self.check_rows(*marked, self.problem_of_parts, "data.train")
        if sum(map(len, kept)) < sum(map(len, rows)):
            parts = [self.tokenize(dataset) for dataset in kept]
        self.reading.note_parts(kept, parts, f"parts, by data.max_length {self.data.max_length}")
        if line := no_answer_note(kept, self.columns["answers"]):
            self.reading.note("no answer", line)
            settings = {"fn_kwargs": {"tokenizer": self.tokenizer}}
            parts, self.no_answer = [of_rows.map(point_at_no_answer, **settings) for of_rows in parts], True
        (train, validation), self.validation_rows = parts, kept[1]
        train = train.filter(lambda start: start != IGNORED, input_columns="start_positions")
        for line in unused(kept[0][self.columns["answers"]], len(parts[0]) - len(train)):
            self.reading.note("ignored", line)
        self.parts = validation.select_columns(["row", "offsets"])
        return tuple(dataset.remove_columns(["row", "offsets"]) for dataset in (train, validation))

    def row_problem(self, row):
        if not self.no_answer and has_no_answer(row[self.columns["answers"]]):
            return "it has no answer, and the first rows, which decide, all have one"
        return self.problem(row)

    def examples_of(self, rows):
        parts = features(rows, range(len(rows[self.columns["question"]])), **self.columns, **self.settings)
        starts, answers = zip(parts["row"], parts["start_positions"], strict=True), self.columns["answers"]
        held = {row for row, start in starts if start != IGNORED}
        given = ({answers: of_row, "is_held": row in held} for row, of_row in enumerate(rows[answers]))
        found, names = [*map(self.problem_of_parts, given)], ("start_positions", "end_positions")
        if self.no_answer:
            marked = (dict(zip(parts, values, strict=True)) for values in zip(*parts.values(), strict=True))
            points = [point_at_no_answer(part, self.tokenizer) for part in marked]
            parts |= {name: [point[name] for point in points] for name in names}
        used = [part for part, start in enumerate(parts[names[0]]) if start != IGNORED]
        columns = {name: [values[part] for part in used] for name, values in parts.items()}
        return {**columns, "problem": [problem or "" for problem in found]}

    def problem(self, row):
        """Return the problem of a row, or None."""
        question, context, answers = (row[column] for column in self.columns.values())
        answers = None if has_no_answer(answers) else answers or {}
        found = row_problem(question, context, answers, **self.settings)
        return f"{found} (question {row['id']})" if found and row.get("id") else found

    def problem_of_parts(self, row):
        """Return the problem of a row whose answer no part holds, or None."""
        limits = f"data.max_length is {self.data.max_length}, data.doc_stride {self.data.doc_stride}"
        found = f"no part of its context holds its whole answer: {limits} (raise it)"
        return None if row["is_held"] or has_no_answer(row[self.columns["answers"]]) else found

    def tokenize(self, dataset):
        settings = {"fn_kwargs": {**self.columns, **self.settings}, "remove_columns": dataset.column_names}
        return dataset.map(features, batched=True, with_indices=True, **settings)

    @cached_property
    def settings(self):
        """The settings by which texts are tokenised; with token types if the model takes them."""
        settings = {"max_length": self.data.max_length, "doc_stride": self.data.doc_stride}
        settings["token_types"] = getattr(self.model_config(), "type_vocab_size", 0) > 1
        return {"tokenizer": self.tokenizer, **settings}

    def num_items(self, batch):
        """Return the number of examples: the mean over starts and the mean over ends have the same items."""
        return int((batch["start_positions"] != IGNORED).sum())

    def loss(self, outputs, batch):
        starts, ends = context_logits(outputs, batch["input_ids"], self.tokenizer, self.no_answer)
        of_starts = torch.nn.functional.cross_entropy(starts, batch["start_positions"], ignore_index=IGNORED)
        of_ends = torch.nn.functional.cross_entropy(ends, batch["end_positions"], ignore_index=IGNORED)
        return (of_starts + of_ends) / 2

    def predict(self, outputs, batch):
        inputs = batch["input_ids"], self.tokenizer
        spans = best_spans(*context_logits(outputs, *inputs), self.data.max_answer_length)
        spans = above_no_answer(spans, outputs, *inputs) if self.no_answer else spans
        return spans, batch["start_positions"].tolist()

    def validate(self, model, windows, accelerator):
        """Return the metrics. The threshold of "no answer" is saved in the model's config."""
        scores = super().validate(model, windows, accelerator)
        if self.no_answer:
            accelerator.unwrap_model(model).config.no_answer_threshold = scores["no_answer_threshold"]
        return scores

    def source_metrics(self):
        """Return the metrics of the questions of each source; the parts of a context are one question."""
        if self.validation_sources is None:
            return {}
        sources = dict(zip(self.parts["row"], self.validation_sources, strict=True))
        of_rows = [source for _, source in sorted(sources.items())]
        return self.scored.by_source(of_rows)

    def metrics(self, predictions, references):
        questions, contexts, answers = (self.validation_rows[name] for name in self.columns.values())
        of_rows = best_of_rows(predictions, self.parts["row"], self.parts["offsets"])
        best = [span for _, span in sorted(of_rows.items())]
        found = [context[start:end] for context, (_, start, end) in zip(contexts, best, strict=True)]
        threshold = {}
        if self.no_answer:
            margins = np.array([margin for margin, _, _ in best])
            found, threshold["no_answer_threshold"] = answers_or_none(margins, found, self.right())
        self.samples[:] = [
            {"question": question, "answer": span, "reference": next(iter(right["text"]), "")}
            for question, span, right in islice(zip(questions, found, answers, strict=True), 5)
        ]
        self.scored = ScoredRows(found, self.right(), self.compute)
        return self.score(found) | threshold

    def right(self):
        """Return the right answers of each validation row."""
        return [answers["text"] for answers in self.validation_rows[self.columns["answers"]]]

    def score(self, found):
        """Return exact match and F1 of an answer to each validation row."""
        return self.compute(found, self.right())

    def compute(self, found, right):
        """Return exact match and F1 of answers, from the right answers to each."""
        from gradacc_hf.metrics import load  # slow to import, so not before it is needed

        metric = load("squad_v2" if self.no_answer else "squad")
        return metric.compute(predictions=found, references=right)

    def baseline(self, train, validation):
        """Return the scores of a constant answer: the context's first sentence or, if better, no answer."""
        contexts = self.validation_rows[self.columns["context"]]
        first = [re.split(r"(?<=[.!?])\s", text.strip(), maxsplit=1)[0] for text in contexts]
        answers = [first, [""] * len(first)] if self.no_answer else [first]
        return max(map(self.score, answers), key=lambda scores: scores["f1"])

    def example_of(self, row):
        return {"question": row[self.data.question_column], "context": row[self.data.context_column]}

    def answer(self, model, inputs):
        """Return the answer to each question, with its start in the context and its probability."""
        found = []
        for number, row in enumerate(inputs, start=1):
            columns = [self.columns[name] for name in ("question", "context")]
            if not isinstance(row, dict) or not set(columns) <= set(row):
                raise InputError(f"input {number}: found {row!r}; give rows of {' and '.join(columns)}")
            texts = [row[column] for column in columns]
            if problem := row_problem(*texts, **self.settings):
                raise InputError(f"input {number}: {problem}; give rows of a question and its context")
            found.append(find_answer(model, *texts, self.data.max_answer_length, **self.settings))
        return found


if __name__ == "__main__":
    run(QuestionAnswering)
