"""Tokenizers of a token a byte, with the chat templates of three models, and what is learned of a chat."""

from itertools import groupby
from pathlib import Path

import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from gradacc_hf.accumulation.loss_items import IGNORED
from gradacc_hf.tasks.chat import tokenize_chat, tokenize_completion

TEMPLATES = Path(__file__).parent / "templates"
CHATML = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
MARKS = {
    "smollm2": ["<|im_start|>", "<|im_end|>"],
    "llama3": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "qwen3": ["<|im_start|>", "<|im_end|>"],  # its instructions for calls are shortened
}
"""The special tokens of a template in templates/."""


def byte_tokenizer(template=CHATML, special=()):
    """A token a byte, so that every boundary is one of tokens, and <s>, </s>, <pad>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template=template,
        model_max_length=512,
    )
    made.add_tokens([AddedToken(token, special=True) for token in special])
    return made


def tokenizer_of(model):
    """The byte tokenizer with the template and the special tokens of a model."""
    template = (TEMPLATES / f"{model}.jinja").read_text(encoding="utf-8")
    return byte_tokenizer(template, MARKS[model])


def learned_of_row(tokenizer, form, row, max_length=10_000):
    """The learned texts of a row, in order, decoded, and the problem of the row."""
    if problem := form.problem(row):
        return [], problem
    tokenize = tokenize_chat if form.is_chat else tokenize_completion
    found = tokenize(tokenizer, **form.read(row), max_length=max_length)
    runs = groupby(found["labels"], key=lambda label: label != IGNORED)
    return [tokenizer.decode(list(run)) for learned, run in runs if learned], found["problem"]
