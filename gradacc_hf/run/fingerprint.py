"""Checksums of data and settings: for a run to resume, and for examples that are in both data sets."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import yaml
from datasets import Dataset

from gradacc_hf.config.schema import Config
from gradacc_hf.data.reading import counted
from gradacc_hf.errors import InputError

pc: Any = pyarrow.compute  # the functions are made at import, so type checkers do not know them
MIXER = 0x5851F42D4C957F2D  # an odd number, with which sketches of columns are mixed
TARGETS = ("labels", "start_positions", "end_positions", "augment")  # not inputs of a model
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
        if _is_file(field.type):
            digests = [
                None if row is None else digest_of_file(**row) for row in table.column(number).to_pylist()
            ]
            table = table.set_column(number, field.name, pa.array(digests, pa.string()))
    return table


def digest_of_file(bytes: bytes | None, path: str | None) -> str:
    """Return a checksum of the content of an image or a sound."""
    content = bytes if bytes is not None else Path(path).read_bytes() if path else b""
    return hashlib.sha256(content).hexdigest()


def duplicates_note(training: Dataset, validation: Dataset, truncated: bool = False) -> str | None:
    """Return a line about validation examples that share their inputs with a training example, or None.

    Args:
        training: Training examples.
        validation: Validation examples.
        truncated: Whether inputs were truncated, so that rows that differ in the file may have equal inputs.
    """
    if not (number := len(shared_examples(training, validation))):
        return None
    some = "all" if number == len(validation) else f"{number:,} of"
    after = ", compared after truncation" * truncated
    return f"{some} {counted(len(validation), 'validation example')} are also training examples{after}"


def shared_examples(training: Dataset, validation: Dataset) -> list[tuple[int, int]]:
    """Return each validation example that shares inputs with training examples, and the first of these."""
    names = _input_columns(training)
    if not names or not {*names} <= {*validation.column_names}:
        return []
    train, other = (split.select_columns(names) for split in (training, validation))
    of_train, of_other = _sketches(train), _sketches(other)
    rows, other_rows = (
        np.flatnonzero(np.isin(*both)) for both in ((of_train, of_other), (of_other, of_train))
    )
    first: dict[bytes, int] = {}
    for row, key in zip(rows.tolist(), _keys(train.select(rows)), strict=True):
        first.setdefault(key, row)
    keys = zip(other_rows.tolist(), _keys(other.select(other_rows)), strict=True)
    return [(row, first[key]) for row, key in keys if key in first]


def repeated_examples(dataset: Dataset) -> list[tuple[int, int]]:
    """Return each example that shares its inputs with an earlier example, and the first of these."""
    if not (names := _input_columns(dataset)):
        return []
    inputs = dataset.select_columns(names)
    _, place, counts = np.unique(_sketches(inputs), return_inverse=True, return_counts=True)
    rows = np.flatnonzero(counts[place] > 1)
    first: dict[bytes, int] = {}
    pairs = [
        (row, first.setdefault(key, row))
        for row, key in zip(rows.tolist(), _keys(inputs.select(rows)), strict=True)
    ]
    return [(row, earlier) for row, earlier in pairs if row != earlier]


def _input_columns(dataset: Dataset) -> list[str]:
    return [name for name in dataset.column_names if name not in TARGETS]


def _sketches(dataset: Dataset) -> np.ndarray:
    """Return a number for each row, which equal rows share. Most of the content is not read."""
    found = [np.zeros(0, np.int64)]
    for table in dataset.with_format("arrow").iter(batch_size=10_000):
        whole: Any = table.combine_chunks()  # type: ignore[union-attr]
        sketch = np.zeros(len(whole), np.int64)
        for name in sorted(whole.column_names):
            for numbers in _sketch(whole.column(name).chunk(0)):
                sketch = sketch * MIXER + numbers.astype(np.int64)  # wraps around
        found.append(sketch)
    return np.concatenate(found)


def _sketch(column: Any) -> Iterable[np.ndarray]:
    """Yield the lengths of texts and files; of lists of integers also three values, within the list."""
    if _is_list_of_integers(column.type):
        numbers, starts = column.values, column.offsets.to_numpy()[:-1]
        numbers = (pc.fill_null(numbers, 0) if numbers.null_count else numbers).to_numpy()
        yield (lengths := pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False))
        for quarter in (1, 2, 3):
            values = np.zeros(len(lengths), np.int64)
            values[lengths > 0] = numbers[(starts + lengths * quarter // 4)[lengths > 0]]
            yield values
    elif pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        yield pc.fill_null(pc.binary_length(column), -1).to_numpy(zero_copy_only=False)
    elif _is_file(column.type):
        parts = dict(zip([part.name for part in column.type], column.flatten(), strict=True))
        files = zip(pc.binary_length(parts["bytes"]).to_pylist(), parts["path"].to_pylist(), strict=True)
        yield np.array([_size(size, path) for size, path in files], np.int64)


def _size(size: int | None, path: str | None) -> int:
    return size if size is not None else Path(path).stat().st_size if path else 0


def _is_file(kind: Any) -> bool:
    return pa.types.is_struct(kind) and {part.name for part in kind} == {"bytes", "path"}


def _is_list_of_integers(kind: Any) -> bool:
    return (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and pa.types.is_integer(kind.value_type)


def _keys(dataset: Dataset) -> Iterable[bytes]:
    """Yield a checksum of each row."""
    for table in dataset.with_format("arrow").iter(batch_size=1_000):
        whole = _files_by_content(table.combine_chunks())  # type: ignore[union-attr]
        columns = [_values(whole.column(name).chunk(0)) for name in sorted(whole.column_names)]
        for row in zip(*columns, strict=True):
            digest = hashlib.blake2b(digest_size=16)
            for value in row:
                digest.update(b"%d:" % len(value) + value)
            yield digest.digest()


def _values(column: Any) -> Iterable[bytes]:
    """Return the bytes of each value. Lists of numbers are not read into Python."""
    if _is_list_of_integers(column.type) and not column.null_count:
        offsets, numbers = column.offsets.to_pylist(), column.values.to_numpy(zero_copy_only=False)
        return [numbers[start:end].tobytes() for start, end in pairwise(offsets)]
    return [repr(value).encode() for value in column.to_pylist()]


def what_must_stay(config: Config, training: Dataset, validation: Dataset) -> dict[str, Any]:
    """Return every setting that changes what a run computes, by key. Data sets are given by content."""
    settings = {section: asdict(getattr(config, section)) for section in SECTIONS}
    same = {key: value for section, values in settings.items() for key, value in _flat(section, values)}
    for key in ("data.leave_out", "train.on_nonfinite", "data.train", "data.validation"):
        del same[key]  # the first two affect later windows only
    return same | {"data.train": fingerprint(training), "data.validation": fingerprint(validation)}


def fingerprint_of_mixture(
    sources: Sequence[str] | None, shares: Mapping[str, str] | None, weights: np.ndarray | None
) -> dict[str, str]:
    """Return a checksum of the sources and weights of the training examples; nothing without them."""
    if sources is None and weights is None:
        return {}
    found = [sources and [*sources], dict(shares or {}), None if weights is None else weights.tolist()]
    return {"data.mixture": f"sha256:{hashlib.sha256(json.dumps(found).encode()).hexdigest()}"}


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
