"""The data and settings that a resumed run must have in common with its checkpoint."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml
from datasets import Dataset

from gradacc_hf.config.schema import Config
from gradacc_hf.errors import InputError

SECTIONS = ("model", "data", "batch", "optim", "train")  # budget, output and checkpoints may change


def fingerprint(dataset: Dataset) -> str:
    """Return a checksum of all rows, in order."""
    digest = hashlib.sha256()
    for table in dataset.with_format("arrow").iter(batch_size=10_000):
        sink = pa.BufferOutputStream()
        plain: Any = _files_by_content(table.replace_schema_metadata(None).combine_chunks())  # type: ignore[union-attr]
        with pa.ipc.new_stream(sink, plain.schema) as writer:
            writer.write_table(plain)
        digest.update(sink.getvalue())
    return f"sha256:{digest.hexdigest()}"


def _files_by_content(table: Any) -> Any:
    """Replace the files of images and sounds by checksums of their content."""
    for number, field in enumerate(table.schema):
        if pa.types.is_struct(field.type) and {part.name for part in field.type} == {"bytes", "path"}:
            digests = [None if row is None else _digest(**row) for row in table.column(number).to_pylist()]
            table = table.set_column(number, field.name, pa.array(digests, pa.string()))
    return table


def _digest(bytes: bytes | None, path: str | None) -> str:
    content = bytes if bytes is not None else Path(path).read_bytes() if path else b""
    return hashlib.sha256(content).hexdigest()


def what_must_stay(config: Config, training: Dataset, validation: Dataset) -> dict[str, Any]:
    """Return every setting that changes what a run computes, by key. Data sets are given by content."""
    settings = {section: asdict(getattr(config, section)) for section in SECTIONS}
    same = {key: value for section, values in settings.items() for key, value in _flat(section, values)}
    for key in ("data.leave_out", "train.on_nonfinite", "data.train", "data.validation"):
        del same[key]  # the first two affect later windows only
    return same | {"data.train": fingerprint(training), "data.validation": fingerprint(validation)}


def check_same_settings(config: Config, run: Path) -> None:
    """Raise InputError where a run that has ended was made with other settings than `config`."""
    had = json.loads(json.dumps(yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))))
    for section in ("model", "batch", "optim", "train"):
        now = json.loads(json.dumps(asdict(getattr(config, section))))
        before = dict(_flat(section, had.get(section) or {}))
        for key, value in _flat(section, now):
            if key in before and before[key] != value and key != "model.trust_remote_code":
                raise InputError(
                    f"{key}: found {value!r}, and {run} has ended with {before[key]!r}: give another "
                    "--output.dir to train again"
                )


def _flat(prefix: str, values: dict[str, Any]) -> list[tuple[str, Any]]:
    found = []
    for name, value in values.items():
        key = f"{prefix}.{name}"
        is_section = isinstance(value, dict) and not all(str(name).isdigit() for name in value)
        found += _flat(key, value) if is_section else [(key, value)]
    return found
