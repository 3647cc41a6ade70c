"""The lines of Python in a model card, which use the model with transformers alone."""

import json
from typing import Any

from datasets import Image
from transformers.pipelines import SUPPORTED_TASKS

from gradacc_hf.utils.files import MODEL_CONFIG
from gradacc_hf.utils.redaction import redact

LENGTH, LONGEST = 60, 400  # characters of an example: the preferred number, and the most

GENERATE = """tokens = tokenizer({example}, return_tensors="pt")
print(tokenizer.decode(model.generate(**tokens, max_new_tokens=64)[0], skip_special_tokens=True))"""
USES = {
    "summarization": GENERATE,
    "translation": GENERATE,
    "question-answering": """tokens = tokenizer({question}, {context}, return_tensors="pt")
found = model(**tokens)
start, end = found.start_logits.argmax(), found.end_logits.argmax()
print(tokenizer.decode(tokens.input_ids[0, start : end + 1]))""",
    "sentence-similarity": """tokens = tokenizer([{example}, "a text"], padding=True, return_tensors="pt")
mask = tokens.attention_mask.unsqueeze(-1)
means = (model(**tokens).last_hidden_state * mask).sum(1) / mask.sum(1)
print(cosine_similarity(means[:1], means[1:]))""",
}
"""The Hub's name of a task for which transformers has no pipeline → code with the tokenizer and the model."""


def example_input(recipe: Any) -> Any:
    """Return an input for the model: a short validation row without secrets, or else `recipe.example`."""
    if (rows := recipe.validation_rows_read) is None:
        return recipe.example
    for column, feature in rows.features.items():
        if isinstance(feature, Image):
            rows = rows.cast_column(column, Image(decode=False))
    found = (redact(_example(recipe, row)) for row in rows)
    usable = [example for example in found if 0 < _length(example) <= LONGEST]
    return min(usable, key=lambda example: abs(_length(example) - LENGTH), default=recipe.example)


def _example(recipe: Any, row: Any) -> Any:
    try:
        return recipe.example_of(row)
    except (AttributeError, KeyError, TypeError, ValueError):  # a bad row, which the run skipped
        return None


def _length(example: Any) -> int:
    """Return the characters of an input: a text, or several. 0 if an input is none that a shell can take."""
    texts = [*example.values()] if isinstance(example, dict) else [example]
    is_usable = all(isinstance(text, str) and text.strip() and text[0] != "-" for text in texts)
    return sum(map(len, texts)) if is_usable else 0


def snippet(recipe: Any, name: str) -> str:
    """Return a complete Python program; `name` is the folder or Hub name of a model or of adapters."""
    task, loader, lora = recipe.pipeline_tag, recipe.model_class.__name__, recipe.config.model.lora
    # A reader of the card does not have the files of this machine.
    example = recipe.example if task == "image-classification" else example_input(recipe)
    folder, imports, lines = _python(name), [loader], []
    options = ""
    if lora.rank and not lora.merge:  # needs peft; the config beside the adapters has the labels
        imports.insert(0, "AutoConfig")
        lines.append(f'config = AutoConfig.from_pretrained({folder}, _configuration_file="{MODEL_CONFIG}")')
        options = ", config=config"
    lines.append(f"model = {loader}.from_pretrained({folder}{options})")
    if task in SUPPORTED_TASKS:
        if not options:
            imports, lines = [], [f'model = pipeline("{task}", model={folder})']
        else:
            lines.append(f'model = pipeline("{task}", model=model, tokenizer={folder})')
        imports.append("pipeline")
        asked = [{"role": "user", "content": example}] if recipe.of_chats else example
        lines.append(f"print(model({_python(asked)}))")
    else:
        imports.insert(0, "AutoTokenizer")
        lines.insert(0, f"tokenizer = AutoTokenizer.from_pretrained({folder})")
        rows = example if isinstance(example, dict) else {}
        shown = {"example": _python(example), **{key: _python(value) for key, value in rows.items()}}
        lines += [USES[task].format_map(shown)] if task in USES else []
    more = "from torch.nn.functional import cosine_similarity\n" * (task == "sentence-similarity")
    return f"{more}from transformers import {', '.join(imports)}\n\n" + "\n".join(lines)


def _python(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
