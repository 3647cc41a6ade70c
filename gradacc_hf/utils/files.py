"""Atomic writes of files and folders.

A file or folder is written under a temporary name in the same folder, flushed to the disk, and renamed. A
reader finds the old version or the new one, never a partial one, even if the run is killed. Replacing a
folder takes two renames. If a run is killed between them, the next write first restores the old folder.
"""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from gradacc_hf.utils.adapters import (
    ADAPTER_CONFIG,
    complete_adapters,
    has_initial_adapters,
    plain_adapters,
)

WriteModel = Callable[[Any, Path, Mapping[str, torch.Tensor]], None]
MODEL_CONFIG = "model_config.json"


def write_pretrained(model: Any, folder: Path, state: Mapping[str, torch.Tensor]) -> None:
    """Write a model for `from_pretrained`. For a model with adapters, write the adapters alone.

    Beside adapters, the config of the model is stored as `model_config.json`. It holds the settings of the
    task, such as the labels. With a `config.json`, transformers would load the folder as a base model.

    Args:
        model: the model, not wrapped.
        folder: an existing folder.
        state: the state dict of the model.
    """
    if not hasattr(model, "save_pretrained"):
        tensors = {name: tensor.contiguous() for name, tensor in state.items()}
        save_file(tensors, folder / "model.safetensors")
        return
    has_first = has_initial_adapters(model)
    model.save_pretrained(folder, state_dict=plain_adapters(model, state) if has_first else state)
    if (folder / ADAPTER_CONFIG).exists():
        complete_adapters(folder, are_plain=has_first)
        model.config.to_json_file(folder / MODEL_CONFIG)


def save_model(
    model: torch.nn.Module,
    folder: Path,
    accelerator: Accelerator,
    *companions: Any,
    write: WriteModel = write_pretrained,
) -> None:
    """Save a prepared model with its companions, such as a tokenizer or an image processor.

    Call it on every process: gathering the weights of a sharded model is collective. The main process writes.
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
    """Yield a folder to fill. It replaces `folder` when the block ends without an error.

    All files get the mode that the umask gives.
    """
    unfinished, old = folder.with_name(f".{folder.name}.unfinished"), folder.with_name(f".{folder.name}.old")
    _tidy(folder, unfinished, old)  # remains of a killed run
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        mode = unfinished.stat().st_mode & 0o666  # safetensors writes for the owner alone
        for path in sorted(unfinished.rglob("*")):
            if path.is_file():
                path.chmod(mode)
            flush(path)
        put_in_place(unfinished, folder)
    finally:
        _tidy(folder, unfinished, old)


def put_in_place(unfinished: Path, folder: Path) -> None:
    """Replace `folder` by a folder whose files have all been flushed to the disk."""
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
    """Write a text file atomically."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.unlink(missing_ok=True)  # a link left there must not be written through
    unfinished.write_text(text, encoding="utf-8")
    flush(unfinished)
    unfinished.replace(path)
    flush(path.parent)


def write_new(paths: Iterable[Path], text: str) -> Path:
    """Write a text file atomically under the first of these paths that is free, and return the path.

    Several processes may write at once: each gets a separate path.
    """
    for path in paths:
        unfinished = path.with_name(f".{path.name}.unfinished")
        try:
            file = unfinished.open("x", encoding="utf-8")
        except FileExistsError:  # another process is writing this file
            continue
        with file:
            if not os.path.lexists(path):
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
                unfinished.replace(path)
                flush(path.parent)
                return path
        unfinished.unlink()
    raise FileExistsError("all paths are taken")


def flush(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    if os.name == "nt" and path.is_dir():  # Windows cannot open folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
