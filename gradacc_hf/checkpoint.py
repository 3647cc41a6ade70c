"""Writing a run's files whole or not at all.

A file or folder is written beside its place under a temporary name, flushed to the disk and renamed: whoever
reads it sees the old one or the new one, never half of one, wherever the run is killed. A folder takes two
renames; between them the old one is whole under its other name, and the next write puts it back first.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save_file


def save_model(model: torch.nn.Module, folder: Path, accelerator: Accelerator, *companions: Any) -> None:
    """Save a prepared model, and what belongs to it (a tokenizer, an image processor), for `from_pretrained`.

    Called by every process, as gathering the weights of a sharded model is collective; one of them writes.
    """
    state: Any = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        unwrapped = accelerator.unwrap_model(model)
        with whole_folder(folder) as unfinished:
            if hasattr(unwrapped, "save_pretrained"):
                unwrapped.save_pretrained(unfinished, state_dict=state)
            else:
                save_file(
                    {name: tensor.contiguous() for name, tensor in state.items()},
                    unfinished / "model.safetensors",
                )
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
            _flush(path)
        if folder.exists():
            folder.rename(old)
        unfinished.rename(folder)
        _flush(folder.parent)
    finally:
        _tidy(folder, unfinished, old)


def _tidy(folder: Path, unfinished: Path, old: Path) -> None:
    if old.exists() and not folder.exists():
        old.rename(folder)
    for leftover in (unfinished, old):
        shutil.rmtree(leftover, ignore_errors=True)


def write_whole(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(text, encoding="utf-8")
    _flush(unfinished)
    unfinished.replace(path)
    _flush(path.parent)


def _flush(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # cannot be opened there
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
