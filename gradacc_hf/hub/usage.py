"""The shortest lines of Python that use a model, for its card."""

import json
from typing import Any

from transformers.pipelines import SUPPORTED_TASKS

from gradacc_hf.utils.files import MODEL_CONFIG

GENERATE = """tokens = tokenizer({example}, return_tensors="pt")
print(tokenizer.decode(model.generate(**tokens, max_new_tokens=64)[0], skip_special_tokens=True))"""
USES = {
    "summarization": GENERATE,
    "translation": GENERATE,
    "question-answering": """tokens = tokenizer({question}, {context}, return_tensors="pt")
found = model(**tokens)
start, end = found.start_logits.argmax(), found.end_logits.argmax()
print(tokenizer.decode(tokens.input_ids[0, start : end + 1]))""",
}
"""The Hub's name of a task for which transformers has no pipeline → code with the tokenizer and the model."""
SEARCH = """from sentence_transformers import SentenceTransformer

model = SentenceTransformer({folder})
embeddings = model.encode([{example}, "a text"])
print(model.similarity(embeddings[:1], embeddings[1:]))"""


ONNX = """from onnxruntime import InferenceSession
from transformers import {loader}
{imports}
inputs = {loader}.from_pretrained(".")({example}, return_tensors="np")
print(InferenceSession("model.onnx").run(None, dict(inputs)))"""


def onnx_snippet(recipe: Any) -> str:
    """Return a complete Python program that runs an exported model, in its folder."""
    example, loader, imports = recipe.example, "AutoTokenizer", ""
    if "image" in recipe.pipeline_tag:
        loader, imports = "AutoImageProcessor", "from PIL import Image\n"
        shown = f"Image.open({_python(example)})"
    elif isinstance(example, dict):  # a question and a context
        shown = ", ".join(map(_python, example.values()))
    else:
        shown = _python([example])
    return ONNX.format(loader=loader, imports=imports, example=shown)


def loading_line(recipe: Any, folder: str) -> str:
    """Return one line of Python that loads a whole model from a folder of a run."""
    if recipe.pipeline_tag == "sentence-similarity":
        return f"sentence_transformers.SentenceTransformer({_python(folder)})"
    return f"transformers.{recipe.model_class.__name__}.from_pretrained({_python(folder)})"


def snippet(recipe: Any, name: str) -> str:
    """Return a complete Python program; `name` is the folder or Hub name of a model or of adapters."""
    task, loader, lora = recipe.pipeline_tag, recipe.model_class.__name__, recipe.config.model.lora
    example, folder, imports, lines = recipe.example, _python(name), [loader], []
    if task == "sentence-similarity":
        return SEARCH.format(folder=folder, example=_python(example))
    options, tokenizer = "", ""
    is_adapter = lora.rank and not lora.merge
    if is_adapter and task == "text-generation":  # a pipeline loads the base model, too
        tokenizer = f", tokenizer={folder}"
    elif is_adapter:  # needs peft; the config beside the adapters has the labels
        imports.insert(0, "AutoConfig")
        lines.append(f'config = AutoConfig.from_pretrained({folder}, _configuration_file="{MODEL_CONFIG}")')
        options = ", config=config"
    lines.append(f"model = {loader}.from_pretrained({folder}{options})")
    if task in SUPPORTED_TASKS:
        if not options:
            imports, lines = [], [f'model = pipeline("{task}", model={folder}{tokenizer})']
        else:
            lines.append(f'model = pipeline("{task}", model=model, tokenizer={folder})')
        imports.append("pipeline")
        if recipe.of_rewards and recipe.of_chats:
            imports.insert(0, "AutoTokenizer")
            lines = [*_chat_lines(example, folder), *lines]
        lines.append(f"print(model({_asked(recipe)}))")
    else:
        imports.insert(0, "AutoTokenizer")
        lines.insert(0, f"tokenizer = AutoTokenizer.from_pretrained({folder})")
        rows = example if isinstance(example, dict) else {}
        shown = {"example": _python(example), **{key: _python(value) for key, value in rows.items()}}
        lines += [USES[task].format_map(shown)] if task in USES else []
    return f"from transformers import {', '.join(imports)}\n\n" + "\n".join(lines)


def _chat_lines(question: str, folder: str) -> list[str]:
    """Return lines that write a chat with an answer as a text."""
    chat = [{"role": "user", "content": question}, {"role": "assistant", "content": "An answer."}]
    text = f"AutoTokenizer.from_pretrained({folder}).apply_chat_template(chat, tokenize=False)"
    return [f"chat = {_python(chat)}", f"text = {text}"]


def _asked(recipe: Any) -> str:
    """Return the arguments of a pipeline. Texts are not sampled, and a score passes no sigmoid."""
    if recipe.of_rewards and recipe.of_chats:  # the template writes the special tokens
        return 'text, function_to_apply="none", add_special_tokens=False'
    if recipe.of_rewards:
        return f'{_python(recipe.example)}, function_to_apply="none"'
    asked = [{"role": "user", "content": recipe.example}] if recipe.of_chats else recipe.example
    return _python(asked) + ", do_sample=False" * (recipe.pipeline_tag == "text-generation")


def _python(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
