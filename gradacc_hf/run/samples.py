"""The answers of the model before training, beside the answers of the trained model.

They are kept in the folder of the run, so that a resumed run has them, too.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from gradacc_hf.utils.files import write_whole

FILE = "samples_before.json"
BEFORE = "before training"
ANSWERS = ("answer", "output")
"""Keys of a sample with the answer of the model."""

Sample = Mapping[str, str]


def keep_before(folder: Path, samples: Sequence[Sample]) -> None:
    """Keep the samples of the model before training, if they have answers."""
    if samples and any(key in samples[0] for key in ANSWERS):
        write_whole(folder / FILE, json.dumps([*samples], indent=2, ensure_ascii=False) + "\n")


def with_before(folder: Path, samples: Sequence[Sample]) -> list[dict[str, str]]:
    """Return samples with the answer of the model before training, if it was kept for the same inputs."""
    file = folder / FILE
    if not file.is_file() or not samples:
        return [dict(sample) for sample in samples]
    before = json.loads(file.read_text(encoding="utf-8"))
    same = len(before) == len(samples) and all(
        _inputs(one) == _inputs(other) for one, other in zip(before, samples, strict=False)
    )
    if not same:
        return [dict(sample) for sample in samples]
    return [_joined(one, other) for one, other in zip(before, samples, strict=True)]


def _inputs(sample: Sample) -> dict[str, str]:
    return {key: text for key, text in sample.items() if key not in (*ANSWERS, BEFORE)}


def _joined(before: Sample, after: Sample) -> dict[str, str]:
    """Return a sample with the earlier answer in front of the later one."""
    found: dict[str, str] = {}
    for key, text in after.items():
        if key in ANSWERS:
            found[BEFORE] = before[key]
        found[key] = text
    return found
