"""Writing a run's files whole or not at all.

A file or folder is written beside its place under a temporary name, flushed to the disk and renamed: whoever
reads it sees the old one or the new one, never half of one, wherever the run is killed. A folder takes two
renames; between them the old one is whole under its other name, and the next write puts it back first.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save_file

WriteModel = Callable[[Any, Path, Mapping[str, torch.Tensor]], None]
MODEL_CONFIG = "model_config.json"


def write_pretrained(model: Any, folder: Path, state: Mapping[str, torch.Tensor]) -> None:
    """Write a model, whose state dict is `state`, for `from_pretrained`; of one with adapters, these alone.

    Beside adapters, the model's config is `model_config.json`: it has what the task set, such as the labels.
    (As config.json, transformers would take the folder for that of the base model.)
    """
    if not hasattr(model, "save_pretrained"):
        tensors = {name: tensor.contiguous() for name, tensor in state.items()}
        save_file(tensors, folder / "model.safetensors")
        return
    model.save_pretrained(folder, state_dict=state)
    if (folder / "adapter_config.json").exists():
        model.config.to_json_file(folder / MODEL_CONFIG)


def save_model(
    model: torch.nn.Module,
    folder: Path,
    accelerator: Accelerator,
    *companions: Any,
    write: WriteModel = write_pretrained,
) -> None:
    """Save a prepared model, and what belongs to it: a tokenizer, an image processor.

    Called by every process, as gathering the weights of a sharded model is collective; one of them writes.
    """
    state: Any = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        with whole_folder(folder) as unfinished:
            write(accelerator.unwrap_model(model), unfinished, state)
            for companion in companions:
                companion.save_pretrained(unfinished)
    accelerator.wait_for_everyone()


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Gives a folder to fill, which takes the place of `folder` when the block ends without an error."""
    unfinished, old = folder.with_name(f".{folder.name}.unfinished"), folder.with_name(f".{folder.name}.old")
    _tidy(folder, unfinished, old)  # what a killed run left
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        for path in sorted(unfinished.rglob("*")):
            flush(path)
        put_in_place(unfinished, folder)
    finally:
        _tidy(folder, unfinished, old)


def put_in_place(unfinished: Path, folder: Path) -> None:
    """Let a folder whose files are all on the disk take the place of `folder`."""
    old = folder.with_name(f".{folder.name}.old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    unfinished.rename(folder)
    flush(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _tidy(folder: Path, unfinished: Path, old: Path) -> None:
    if old.exists() and not folder.exists():
        old.rename(folder)
    for leftover in (unfinished, old):
        shutil.rmtree(leftover, ignore_errors=True)


def write_whole(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.unlink(missing_ok=True)  # never through a link
    unfinished.write_text(text, encoding="utf-8")
    flush(unfinished)
    unfinished.replace(path)
    flush(path.parent)


def flush(path: Path) -> None:
    """Have the system write a file, or the names in a folder, to the disk."""
    if os.name == "nt" and path.is_dir():  # cannot be opened there
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
