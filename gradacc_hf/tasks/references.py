"""Reference log-probabilities: of the answers, under the model from which training starts.

They are computed once, before the first window, by the model that is then trained. No second model is in
memory. They are cached by content: a hash of the token ids, in a file for each model. Other runs with the
same model and answers read them from there. A run also keeps the values that it uses in its folder, so that
it resumes with the same ones.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch.nn.utils.rnn import pad_sequence

from gradacc_hf.accumulation.loss_items import IGNORED
from gradacc_hf.accumulation.oom import out_of_memory
from gradacc_hf.errors import InputError
from gradacc_hf.tasks.answer_scores import scores_of
from gradacc_hf.utils.files import flush
from gradacc_hf.utils.memory import release_memory
from gradacc_hf.utils.modeling import without_dropout
from gradacc_hf.utils.rng import preserve_rng_state

FILE = "references.safetensors"
"""The file in the folder of a run."""
KEY_BYTES = 16  # of a hash of token ids
NOT_COMPUTED = ("_name_or_path", "architectures", "dtype", "transformers_version", "use_cache")
"""Settings of a model's config that change no log-probability."""
Answer = tuple[Sequence[int], Sequence[int]]
"""Token ids, and as labels the ids that count, else −100."""


def key_of(answer: Answer) -> bytes:
    """Return a hash of the token ids and the labels of an answer with its prompt."""
    digest = hashlib.blake2b(digest_size=KEY_BYTES)
    for part in answer:
        digest.update(np.asarray(part, dtype=np.int64).tobytes())
    return digest.digest()


class References:
    """Reference log-probabilities by content: answer → log-probability; NaN if it is not known."""

    def __init__(self) -> None:
        self._values: dict[bytes, float] = {}

    def __getitem__(self, answer: Answer) -> float:
        return self._values.get(key_of(answer), float("nan"))

    def read(self, folder: Path) -> None:
        """Add the values in the folder of a run, if it has any."""
        self._values |= read(folder / FILE)

    def write(self, folder: Path) -> None:
        """Write all values into the folder of a run, if there are any."""
        if self._values:
            write(folder / FILE, self._values)

    def missing(self, answers: Iterable[Answer]) -> dict[bytes, Answer]:
        """Return the answers without a value, each once."""
        found = {key_of(answer): answer for answer in answers}
        return {key: answer for key, answer in found.items() if key not in self._values}

    def compute(
        self,
        model: Any,
        answers: Iterable[Answer],
        accelerator: Accelerator,
        max_tokens: int,
        pad_token_id: int,
    ) -> None:
        """Read the values of answers from the cache, and compute and cache the others.

        Call it in all processes.

        Args:
            model: The model from which training starts, with `score_rows`. It moves to the device.
            answers: The answers of the data.
            accelerator: The Accelerator of the run.
            max_tokens: Padded tokens of a micro-batch.
            pad_token_id: The token of padding.

        Raises:
            InputError: The model does not fit into the memory of the device.
        """
        if not (wanted := self.missing(answers)):
            return
        model = _on_device(model, accelerator)
        file = cache_folder() / f"reference-{fingerprint(model, accelerator)}.safetensors"
        known = read(file) if accelerator.is_main_process else {}
        found: list[Any] = [{key: known[key] for key in wanted if key in known}]
        self._values |= broadcast_object_list(found)[0]
        if not (wanted := {key: wanted[key] for key in wanted if key not in self._values}):
            return
        batches = split(wanted, max_tokens)
        own = batches[accelerator.process_index :: accelerator.num_processes]
        if accelerator.is_main_process:
            name = f"reference log-probabilities of {len(wanted):,} answers"
            own = track(own, name, console=Console(stderr=True), transient=True)
        rows: list[tuple[bytes, float]] = []
        with preserve_rng_state(), without_dropout(model, training=False):
            for keys in own:
                scores = _scores(model, [wanted[key] for key in keys], accelerator, pad_token_id)
                rows += zip(keys, scores, strict=True)
        new = dict(gather_object(rows))
        self._values |= new
        if accelerator.is_main_process:
            with suppress(OSError):  # the cache is optional
                file.parent.mkdir(parents=True, exist_ok=True)
                write(file, read(file) | new)  # another run may have written since


def split(answers: Mapping[bytes, Answer], max_tokens: int) -> list[list[bytes]]:
    """Split answers into micro-batches of similar length, of at most so many padded tokens."""
    order = sorted(answers, key=lambda key: (-len(answers[key][0]), key))
    found: list[list[bytes]] = []
    for key in order:
        if not found or (len(found[-1]) + 1) * len(answers[found[-1][0]][0]) > max_tokens:
            found.append([])
        found[-1].append(key)
    return found


@torch.no_grad()
def _scores(model: Any, answers: list[Answer], accelerator: Accelerator, pad: int) -> list[float]:
    """Return the log-probabilities of answers, in halves if memory runs out."""
    ids, labels = ([torch.tensor(part) for part in parts] for parts in zip(*answers, strict=True))
    batch = {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
    }
    try:
        with accelerator.autocast():
            outputs = model(**{name: value.to(accelerator.device) for name, value in batch.items()})
        return scores_of(outputs).tolist()
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error) or len(answers) == 1:
            raise
    release_memory()
    half = len(answers) // 2
    return [s for part in (answers[:half], answers[half:]) for s in _scores(model, part, accelerator, pad)]


def _on_device(model: Any, accelerator: Accelerator) -> Any:
    try:
        return model if hasattr(model, "hf_device_map") else model.to(accelerator.device)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise InputError(
            "data.loss: found a model that does not fit on one device, as reference log-probabilities need; "
            "allowed: orpo or simpo, or a smaller model"
        ) from error


def fingerprint(model: torch.nn.Module, accelerator: Accelerator) -> str:
    """Return a hash of the weights, the config, the scales of adapters and the precision.

    New adapters, which change nothing, are left out.
    """
    state = model.state_dict()
    added = [tensor for name, tensor in state.items() if ".lora_B." in name]
    adapted = [(name, module) for name, module in model.named_modules() if hasattr(module, "lora_B")]
    scales = [(name, module.scaling) for name, module in adapted]
    if not any(tensor.any() for tensor in added):
        state = {name.replace(".base_layer.", "."): t for name, t in state.items() if ".lora_" not in name}
        scales = []
    config: Any = model.config
    settings = {name: value for name, value in config.to_dict().items() if name not in NOT_COMPUTED}
    about = [type(model).__name__, accelerator.mixed_precision, settings, scales]
    digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode())
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(memoryview(tensor.view(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()[:24]


def cache_folder() -> Path:
    """Return the folder of cached values."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "gradacc_hf"


def read(file: Path) -> dict[bytes, float]:
    """Return the values of a file; none if it is missing or damaged."""
    try:
        tensors = load_file(file)
        keys, values = tensors["keys"], tensors["values"]
    except (OSError, SafetensorError, KeyError):
        return {}
    if keys.shape != (len(values), KEY_BYTES) or keys.dtype != np.uint8:
        return {}
    return dict(zip(map(bytes, keys), values.tolist(), strict=True))


def write(file: Path, values: Mapping[bytes, float]) -> None:
    """Write values to a file, completely or not at all."""
    keys = np.frombuffer(b"".join(values), np.uint8).reshape(-1, KEY_BYTES)
    tensors = {"keys": keys.copy(), "values": np.array([*values.values()], np.float64)}
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        save_file(tensors, unfinished)
        flush(unfinished)
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)
