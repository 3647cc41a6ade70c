"""`gradacc bench lean_loss`: memory of the loss of a large vocabulary, with logits and without.

Each is measured in a separate process.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from gradacc_hf.training.run_log import measured_with

# Two layers of SmolLM2-135M and of T5-small, so that the loss dominates.
VOCABULARIES = {"decoder": 49152, "encoder-decoder": 32128}


@dataclass(frozen=True)
class LossMemory:
    """Forward and backward of one micro-batch. Bytes are the peak above the model and the gradients."""

    model: str
    bytes_before: int  # with logits
    bytes_after: int  # without logits
    seconds_before: float
    seconds_after: float
    gradient_error: float  # relative, of the gradient without logits


@dataclass(frozen=True)
class LeanLossResult:
    """The memory of the loss of each model of `VOCABULARIES`."""

    tokens: int
    models: list[LossMemory]
    measured_with: dict[str, str]


def measure_lean_loss(tokens: int = 2048) -> LeanLossResult:
    """Measure both ways of each model on the GPU if there is one, else on the CPU."""
    models, device = [], "cpu"
    for model in VOCABULARIES:
        found = []
        for lean in ("0", "1"):
            command = [sys.executable, "-m", "gradacc_hf.bench.lean_memory", model, str(tokens), lean]
            printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            found.append(json.loads(printed.splitlines()[-1]))
        before, after = found
        device = before["device"]
        sizes, times = (before["bytes"], after["bytes"]), (before["seconds"], after["seconds"])
        models.append(LossMemory(model, *sizes, *times, after["gradient_error"]))
    return LeanLossResult(tokens, models, measured_with(device))


def _build(model: str) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

    vocabulary = VOCABULARIES[model]
    if model == "encoder-decoder":
        options: dict[str, Any] = {"num_layers": 2, "dropout_rate": 0.0, "decoder_start_token_id": 0}
        return T5ForConditionalGeneration(T5Config(vocab_size=vocabulary, **options))
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=2,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def _measure(name: str, tokens: int, lean: bool) -> None:
    """Measure in this process, and print the figures as JSON."""
    import time

    import torch

    from gradacc_hf.accumulation.reference import relative_error, whole_window_gradient
    from gradacc_hf.padding.logits import install, restore_logits
    from gradacc_hf.training.run_log import peak_memory_bytes
    from gradacc_hf.utils.memory import release_freed_memory_at_once

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    release_freed_memory_at_once()  # as in a run
    model = _build(name).to(device)
    ids = torch.randint(VOCABULARIES[name], (tokens // 64, 64), device=device)
    batch = {"input_ids": ids, "labels": ids}
    if lean:
        install(model)  # without the check, which would raise the peak before
    model(
        input_ids=ids[:1, :2], labels=ids[:1, :2]
    ).loss.backward()  # creates the gradients and one-time buffers
    held, started = peak_memory_bytes(device), time.perf_counter()
    model.zero_grad(set_to_none=False)
    model(**batch).loss.backward()
    figures = {"bytes": peak_memory_bytes(device) - held, "seconds": time.perf_counter() - started}
    if lean:
        row = {"input_ids": ids[:8], "labels": ids[:8]}  # logits in two chunks
        gradient = whole_window_gradient(model, row)
        restore_logits(model)
        figures["gradient_error"] = relative_error(gradient, whole_window_gradient(model, row))
    print(json.dumps({**figures, "device": device.type}))


def print_lean_loss(result: LeanLossResult, console: Console) -> None:
    """Print memory and time with and without logits, and the difference of the gradients."""
    for found in result.models:
        before, after = found.bytes_before / 2**20, found.bytes_after / 2**20
        vocabulary = VOCABULARIES[found.model]
        console.print(
            f"{found.model}: forward and backward of {result.tokens:,} tokens with a vocabulary of "
            f"{vocabulary:,}.\n"
            f"With logits: {before:,.0f} MiB, {found.seconds_before:.1f} s.\n"
            f"Without logits: {after:,.0f} MiB, {found.seconds_after:.1f} s.\n"
            f"The gradients differ by {found.gradient_error:.0e} (relative)."
        )


if __name__ == "__main__":
    _measure(sys.argv[1], int(sys.argv[2]), sys.argv[3] == "1")
