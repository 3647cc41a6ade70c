"""What the loss of a large vocabulary takes, with logits and without, each in a process of its own."""

import json
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

from gradacc_hf.training.run_log import measured_with

VOCABULARY, HIDDEN = 49152, 576  # SmolLM2-135M's, under 2 of its 30 layers: the loss is what is measured


@dataclass(frozen=True)
class LeanMemory:
    """Forward and backward of one micro-batch; bytes are the peak beyond the model and its gradients."""

    tokens: int
    bytes_before: int  # with logits
    bytes_after: int  # lean
    seconds_before: float
    seconds_after: float
    gradient_error: float  # relative, of the lean gradient
    measured_with: dict[str, str]


def lean_memory(tokens: int = 2048) -> LeanMemory:
    """Measure both, on the CPU or on the GPU where there is one."""
    found = {}
    for lean in (0, 1):
        command = [sys.executable, "-m", "gradacc_hf.bench.lean_memory", str(tokens), str(lean)]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found[lean] = json.loads(said.splitlines()[-1])
    return LeanMemory(
        tokens=tokens,
        bytes_before=found[0]["bytes"],
        bytes_after=found[1]["bytes"],
        seconds_before=found[0]["seconds"],
        seconds_after=found[1]["seconds"],
        gradient_error=found[1]["gradient_error"],
        measured_with=measured_with(found[0]["device"]),
    )


def _measure(tokens: int, lean: bool) -> None:
    """In a process of its own: print the figures as JSON."""
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
    model(input_ids=ids[:1, :2], labels=ids[:1, :2]).loss.backward()  # gradients, and what is set up once
    held, started = peak_memory_bytes(device), time.perf_counter()
    model.zero_grad(set_to_none=False)
    model(**batch).loss.backward()
    figures = {"bytes": peak_memory_bytes(device) - held, "seconds": time.perf_counter() - started}
    if lean:
        row = {"input_ids": ids[:2], "labels": ids[:2]}  # logits in two pieces
        gradient = whole_window_gradient(model, row)
        del model.forward  # its own again
        figures["gradient_error"] = relative_error(gradient, whole_window_gradient(model, row))
    print(json.dumps({**figures, "device": device.type}))


if __name__ == "__main__":
    _measure(int(sys.argv[1]), sys.argv[2] == "1")
