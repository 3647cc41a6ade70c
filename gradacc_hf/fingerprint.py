"""What a run must have in common with a checkpoint that it goes on from: its data and what it computes."""

import hashlib
from dataclasses import asdict
from typing import Any

import pyarrow as pa
from datasets import Dataset

from gradacc_hf.config import Config

SECTIONS = ("model", "data", "batch", "optim", "train")  # not the budget, the output and the checkpoints


def fingerprint(dataset: Dataset) -> str:
    """A checksum of all rows, in their order."""
    digest = hashlib.sha256()
    for table in dataset.with_format("arrow").iter(batch_size=10_000):
        sink = pa.BufferOutputStream()
        plain: Any = table.replace_schema_metadata(None).combine_chunks()  # type: ignore[union-attr]
        with pa.ipc.new_stream(sink, plain.schema) as writer:
            writer.write_table(plain)
        digest.update(sink.getvalue())
    return f"sha256:{digest.hexdigest()}"


def what_must_stay(config: Config, training: Dataset, validation: Dataset) -> dict[str, Any]:
    """Every setting that changes what a run computes, by its key; data sets by their content."""
    settings = {section: asdict(getattr(config, section)) for section in SECTIONS}
    same = {key: value for section, values in settings.items() for key, value in _flat(section, values)}
    for key in ("data.leave_out", "data.train", "data.validation"):  # the first is about windows to come
        del same[key]
    return same | {"data.train": fingerprint(training), "data.validation": fingerprint(validation)}


def _flat(prefix: str, values: dict[str, Any]) -> list[tuple[str, Any]]:
    found = []
    for name, value in values.items():
        key = f"{prefix}.{name}"
        found += _flat(key, value) if isinstance(value, dict) else [(key, value)]
    return found
