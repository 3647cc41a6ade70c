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

# The sizes of SmolLM2-135M; the model has 2 of the 30 layers, so that the loss dominates.
VOCABULARY, HIDDEN = 49152, 576


@dataclass(frozen=True)
class LeanLossResult:
    """Forward and backward of one micro-batch. Bytes are the peak above the model and the gradients."""

    tokens: int
    bytes_before: int  # with logits
    bytes_after: int  # without logits
    seconds_before: float
    seconds_after: float
    gradient_error: float  # relative, of the gradient without logits
    measured_with: dict[str, str]


def measure_lean_loss(tokens: int = 2048) -> LeanLossResult:
    """Measure both on the GPU if there is one, else on the CPU."""
    found = {}
    for lean in (0, 1):
        command = [sys.executable, "-m", "gradacc_hf.bench.lean_memory", str(tokens), str(lean)]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found[lean] = json.loads(printed.splitlines()[-1])
    return LeanLossResult(
        tokens=tokens,
        bytes_before=found[0]["bytes"],
        bytes_after=found[1]["bytes"],
        seconds_before=found[0]["seconds"],
        seconds_after=found[1]["seconds"],
        gradient_error=found[1]["gradient_error"],
        measured_with=measured_with(found[0]["device"]),
    )


def _measure(tokens: int, lean: bool) -> None:
    """Measure in this process, and print the figures as JSON."""
    import time

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from gradacc_hf.accumulation.reference import relative_error, whole_window_gradient
    from gradacc_hf.tasks.lean_loss import make_lean
    from gradacc_hf.training.run_log import peak_memory_bytes

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=1536,
        num_hidden_layers=2,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    model: Any = LlamaForCausalLM(config)
    model.to(device)
    ids = torch.randint(VOCABULARY, (tokens // 256, 256), device=device)
    batch = {"input_ids": ids, "labels": ids}
    if lean:
        make_lean(model, True)
    model(
        input_ids=ids[:1, :2], labels=ids[:1, :2]
    ).loss.backward()  # creates the gradients and one-time buffers
    held, started = peak_memory_bytes(device), time.perf_counter()
    model.zero_grad(set_to_none=False)
    model(**batch).loss.backward()
    figures = {"bytes": peak_memory_bytes(device) - held, "seconds": time.perf_counter() - started}
    if lean:
        row = {"input_ids": ids[:2], "labels": ids[:2]}  # logits in two chunks
        gradient = whole_window_gradient(model, row)
        del model.forward  # restores the forward of the class
        figures["gradient_error"] = relative_error(gradient, whole_window_gradient(model, row))
    print(json.dumps({**figures, "device": device.type}))


def print_lean_loss(result: LeanLossResult, console: Console) -> None:
    """Print memory and time with and without logits, and the difference of the gradients."""
    before, after = result.bytes_before / 2**20, result.bytes_after / 2**20
    console.print(
        f"Forward and backward of {result.tokens:,} tokens with a vocabulary of {VOCABULARY:,}.\n"
        f"With logits: {before:,.0f} MiB, {result.seconds_before:.1f} s.\n"
        f"Without logits: {after:,.0f} MiB, {result.seconds_after:.1f} s.\n"
        f"The gradients differ by {result.gradient_error:.0e} (relative)."
    )


if __name__ == "__main__":
    _measure(int(sys.argv[1]), sys.argv[2] == "1")
