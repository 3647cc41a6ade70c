"""`gradacc bench memory`: predicted and measured peak memory of real steps, each in a separate process.

On a CPU, the figure is the peak of the resident memory, minus the memory before the model is built. malloc is
set as in a run with `budget.memory` (`release_freed_memory_at_once` in `utils/memory.py`). On a GPU, the
figure is the peak of torch's allocator. The step is in the middle of a run: it is the second window of two
micro-batches, so that gradients and optimizer states exist.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import transformers
from accelerate.utils import convert_outputs_to_fp32
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from gradacc_hf.accumulation.loss_items import IGNORED, model_loss
from gradacc_hf.bench.progress import Progress
from gradacc_hf.comparison.worker import peak_memory, reset_peak_memory
from gradacc_hf.errors import InputError
from gradacc_hf.memory.estimator import Point, StepEstimate, StepSettings, estimate, terms_of
from gradacc_hf.memory.trace import AUTOCAST
from gradacc_hf.padding.removal import remove_padding
from gradacc_hf.tasks.lean_loss import make_lean
from gradacc_hf.training.lora import add_lora
from gradacc_hf.training.optimizer import make_optimizer
from gradacc_hf.training.run_log import measured_with
from gradacc_hf.training.settings import LoraConfig, OptimConfig
from gradacc_hf.utils.memory import release_freed_memory_at_once, release_memory
from gradacc_hf.utils.modeling import checkpoint_activations
from gradacc_hf.utils.verbosity import silence_libraries

MIB = 2**20
ALLOWED_RELATIVE_ERROR, ALLOWED_BYTES = 0.10, 64 * MIB  # the larger one applies
TEXT = {"num_hidden_layers": 6, "hidden_size": 256, "num_attention_heads": 8, "intermediate_size": 1024}
TINY = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
TINY["vocab_size"] = 8000  # `make_batch` draws from 8,000 tokens
SIZES: dict[str, tuple[str, str, dict[str, Any]]] = {  # kind: (auto class, model type, config)
    "encoder": ("AutoModelForSequenceClassification", "bert", {**TEXT, "vocab_size": 8000}),
    "decoder": (
        "AutoModelForCausalLM",
        "llama",
        {**TEXT, "vocab_size": 16000, "num_key_value_heads": 4, "tie_word_embeddings": True},
    ),
    "gpt2": ("AutoModelForCausalLM", "gpt2", {"n_layer": 6, "n_embd": 256, "n_head": 8, "vocab_size": 8000}),
    "encoder-decoder": (
        "AutoModelForSeq2SeqLM",
        "t5",
        {"num_layers": 5, "num_decoder_layers": 4, "d_model": 256, "d_kv": 32, "num_heads": 8}
        | {"d_ff": 1024, "vocab_size": 8000, "decoder_start_token_id": 0},
    ),
    "vit": ("AutoModelForImageClassification", "vit", {**TEXT, "image_size": 224, "patch_size": 16}),
    "minilm": (
        "AutoModelForSequenceClassification",
        "bert",
        {"num_hidden_layers": 6, "hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536},
    ),
    "bert-base": ("AutoModelForSequenceClassification", "bert", {}),
    "decoder-0.5b": (  # the sizes of Qwen2.5-0.5B
        "AutoModelForCausalLM",
        "qwen2",
        {"num_hidden_layers": 24, "hidden_size": 896, "num_attention_heads": 14, "num_key_value_heads": 2}
        | {"intermediate_size": 4864, "vocab_size": 151936, "tie_word_embeddings": True},
    ),
    "tiny-encoder": ("AutoModelForSequenceClassification", "bert", {**TINY}),
    "tiny-decoder": ("AutoModelForCausalLM", "qwen2", {**TINY, "num_key_value_heads": 2}),
}


@dataclass(frozen=True)
class MemoryCase:
    """A model, the training settings, and the micro-batch: `rows` examples of `lengths` tokens.

    Without padding, the examples have evenly spaced lengths, from an eighth of `lengths` on.
    """

    model: str
    rows: int
    lengths: tuple[int, ...]
    attention: str = "sdpa"
    precision: str = "fp32"
    checkpointing: bool = False
    lora: int = 0
    lean: bool = False
    optimizer: Any = "adamw"
    padding_free: bool = False

    @property
    def tokens(self) -> np.ndarray:
        """Tokens of the examples of a micro-batch without padding, (examples, 1)."""
        return np.linspace(self.lengths[0] // 8, self.lengths[0], self.rows).astype(int)[:, None]

    @property
    def name(self) -> str:
        """Return the model and the options in one line."""
        options = [f"LoRA {self.lora}"] * (self.lora > 0) + ["lean loss"] * self.lean
        options += ["checkpointing"] * self.checkpointing
        options += [self.optimizer] * (self.optimizer != "adamw")
        options += ["without padding"] * self.padding_free
        return ", ".join([self.model, self.attention, self.precision, *options])


CASES = (
    MemoryCase("encoder", 8, (256,)),
    MemoryCase("encoder", 4, (256,), attention="eager"),
    MemoryCase("encoder", 8, (256,), precision="bf16"),
    MemoryCase("encoder", 24, (256,), checkpointing=True),
    MemoryCase("encoder", 8, (256,), lora=8),
    MemoryCase("decoder", 4, (256,)),
    MemoryCase("decoder", 2, (512,), attention="eager"),
    MemoryCase("decoder", 4, (256,), precision="bf16"),
    MemoryCase("decoder", 8, (512,), precision="bf16", checkpointing=True, lean=True),
    MemoryCase("decoder", 4, (512,), lora=16, lean=True),
    MemoryCase("gpt2", 4, (256,), optimizer="adafactor"),
    MemoryCase("encoder-decoder", 8, (192, 64)),
    MemoryCase("encoder-decoder", 4, (128, 256), attention="eager", precision="bf16"),
    MemoryCase("encoder-decoder", 16, (192, 64), checkpointing=True),
    MemoryCase("vit", 16, (197,)),
    MemoryCase("vit", 8, (197,), attention="eager", precision="bf16"),
    MemoryCase("vit", 48, (197,), checkpointing=True),
    MemoryCase("encoder", 12, (256,), padding_free=True),
    MemoryCase("encoder", 48, (128,), padding_free=True),
    MemoryCase("encoder", 8, (256,), attention="eager", padding_free=True),
    MemoryCase("encoder", 32, (256,), checkpointing=True, padding_free=True),
    MemoryCase("decoder", 6, (256,), precision="bf16", padding_free=True),
)


@dataclass(frozen=True)
class PredictedPeak:
    """Bytes of one case. `error` is relative to the measured bytes."""

    case: str
    micro_batch: str
    predicted: int
    measured: int
    error: float
    holds: bool


@dataclass(frozen=True)
class PredictedMemoryResult:
    """All cases. A prediction holds within 10 % or 64 MiB, whichever is larger."""

    cases: list[PredictedPeak]
    measured_with: dict[str, str]


def cases_with(words: Sequence[str]) -> list[MemoryCase]:
    """Return the cases with one of these words in the name, or all. Raises InputError if there is none."""
    chosen = [case for case in CASES if not words or any(word in case.name for word in words)]
    if not chosen:
        raise InputError(f"--only: found {words}; allowed: words of {'; '.join(case.name for case in CASES)}")
    return chosen


def compare_memory(cases: Sequence[MemoryCase] = CASES, progress: Progress = iter) -> PredictedMemoryResult:
    """Predict and measure each case, on the GPU if there is one, else on the CPU."""
    found = []
    for case in progress(cases):
        predicted, measured = predict(case), _measure_in_process(case)
        found.append(
            PredictedPeak(
                case=case.name,
                micro_batch=f"{case.rows} × {' + '.join(map(str, case.lengths))}",
                predicted=predicted,
                measured=measured,
                error=predicted / measured - 1,
                holds=abs(predicted - measured) <= max(ALLOWED_RELATIVE_ERROR * measured, ALLOWED_BYTES),
            )
        )
    return PredictedMemoryResult(found, measured_with())


def predict(case: MemoryCase) -> int:
    """Predict the peak minus the memory before the model."""
    memory = step_estimate(case).memory
    if case.padding_free:
        return memory.bytes_without_padding(case.tokens) - memory.workspace
    return memory.bytes(case.rows, case.lengths) - memory.workspace


def step_estimate(case: MemoryCase) -> StepEstimate:
    """Estimate the step of a case from traces of fewer and shorter examples."""
    lengths = [tuple(max(8, part * length // 8) for length in case.lengths) for part in (1, 2, 3, 5, 7, 8)]
    if len(case.lengths) == 2:
        lengths = [
            (lengths[i][0], lengths[j][1]) for i, j in ((0, 0), (1, 2), (3, 0), (0, 4), (4, 1), (2, 3))
        ]
    lengths = lengths if len(case.lengths) == 2 else [lengths[i] for i in (0, 2, 4)]
    lengths = [case.lengths] if case.model == "vit" else lengths
    exponents = terms_of(np.array(lengths))
    few = max(2, -(-1024 // min(min(one) for one in lengths))) if case.lean else 2
    points = [Point(rows, one, make_batch(case, rows, one)) for rows in (few, few + 1) for one in lengths]
    settings = StepSettings(OptimConfig(name=case.optimizer), case.precision, torch.cuda.is_available())
    return estimate(lambda: build(case), points, exponents, model_loss, settings)


def build(case: MemoryCase) -> Any:
    """Build the model of a case with random weights, on the default device."""
    auto_class, model_type, sizes = SIZES[case.model]
    config = transformers.AutoConfig.for_model(model_type, **sizes)
    model = getattr(transformers, auto_class).from_config(config, attn_implementation=case.attention)
    if case.lean:
        make_lean(model, True)
    if case.lora:
        new = [name for name, _ in model.named_parameters() if name.startswith("classifier")]
        add_lora(model, LoraConfig(rank=case.lora), new)
    if case.checkpointing:
        checkpoint_activations(model)
    return model


def is_classifier(model: str) -> bool:
    """Whether a model of `SIZES` has one label per text."""
    return SIZES[model][0] == "AutoModelForSequenceClassification"


def make_batch(
    case: MemoryCase, rows: int, lengths: Sequence[int], device: str | torch.device = "cpu"
) -> dict[str, Any]:
    """Draw random examples. One text is shorter than the others and padded."""
    draw = torch.Generator().manual_seed(0)
    if case.model == "vit":
        labels = torch.zeros(rows, dtype=torch.long)
        batch = {"pixel_values": torch.randn(rows, 3, 224, 224, generator=draw), "labels": labels}
    else:
        ids = torch.randint(5, 8000, (rows, lengths[0]), generator=draw)
        if case.padding_free and rows == case.rows:
            mask = (torch.arange(lengths[0]) < torch.from_numpy(case.tokens)).long()
        else:
            mask = torch.ones_like(ids)
            mask[0, lengths[0] // 2 :] = 0
        labels = torch.zeros(rows, dtype=torch.long) if is_classifier(case.model) else ids
        if case.padding_free and labels is ids:
            labels = torch.where(mask == 1, ids, IGNORED)
        if len(lengths) == 2:
            labels = torch.randint(5, 8000, (rows, lengths[1]), generator=draw)
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {key: value.to(device) for key, value in batch.items()}


def _measure_in_process(case: MemoryCase) -> int:
    command = [sys.executable, "-m", "gradacc_hf.bench.predicted_memory", json.dumps(asdict(case))]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(ran.stdout.splitlines()[-1])


def _measure(case: MemoryCase) -> int:
    """Return the peak of the second window, minus the memory before the model."""
    release_freed_memory_at_once()  # as in a run with `budget.memory`
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tiny = MemoryCase(case.model, 2, tuple(min(16, length) for length in case.lengths), case.attention)
    for _ in range(2):  # libraries set up one-time buffers
        model = build(tiny).to(device)
        _window(tiny, model, make_optimizer(model, OptimConfig()), device)
    del model
    release_memory()
    before = reset_peak_memory(device)
    torch.manual_seed(0)
    model = build(case).to(device).train()
    if case.padding_free:
        remove_padding(model, make_batch(case, case.rows, case.lengths, device))
    optimizer = make_optimizer(model, OptimConfig(name=case.optimizer))
    _window(case, model, optimizer, device)
    reset_peak_memory(device)
    _window(case, model, optimizer, device)
    return peak_memory(device) - before


def _window(case: MemoryCase, model: Any, optimizer: Any, device: torch.device) -> None:
    forward = model
    if case.precision in AUTOCAST:
        forward = convert_outputs_to_fp32(
            torch.autocast(device.type, AUTOCAST[case.precision])(model.__call__)
        )
    for _ in range(2):
        batch = make_batch(case, case.rows, case.lengths, device)
        (model_loss(forward(**batch), batch) / 2).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def print_memory(result: PredictedMemoryResult, console: Console) -> None:
    """Print a row for each case, and the number of predictions that hold."""
    table = Table("case", "micro-batch", box=SIMPLE)
    for header in ("predicted MiB", "measured MiB", "error", ""):
        table.add_column(header, justify="right")
    for row in result.cases:
        figures = (f"{row.predicted / MIB:,.0f}", f"{row.measured / MIB:,.0f}", f"{row.error:+.1%}")
        table.add_row(row.case, row.micro_batch, *figures, "" if row.holds else "too far off")
    console.print(table)
    within = sum(row.holds for row in result.cases)
    console.print(f"{within} of {len(result.cases)} predictions are within 10 % or 64 MiB of the measurement")
    if not torch.cuda.is_available():
        console.print("malloc returns freed blocks above 1 MiB immediately, as in a run with budget.memory")


if __name__ == "__main__":
    silence_libraries()
    given = json.loads(sys.argv[1])
    print(json.dumps(_measure(MemoryCase(**{**given, "lengths": tuple(given["lengths"])}))))
