"""The confusion table of the doctor: what it finds in each loop of `loops/`, by `gradacc doctor`.

    python tests/doctor/confusion.py           # the table
    python tests/doctor/confusion.py lbfgs     # the reports of the loops with this word in the name

A faulty loop names its faults in a comment on their lines: `# fault: not_divided`.
"""

import contextlib
import gc
import importlib.util
import io
import re
import sys
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState

from gradacc_hf.doctor.script import main

LOOPS = Path(__file__).parent / "loops"
NOT_JUDGED = re.compile(
    r"^\? the scale of the loss was not judged|was not judged: no step followed", re.MULTILINE
)
FINDING = re.compile(r"^[✗·] (\w+): .*\n    at      (?:.*/)?([\w.]+):(\d+):", re.MULTILINE)
FAULT = re.compile(r"# fault: (.+)$")

Fault = tuple[str, int]  # name and line


@dataclass(frozen=True)
class Result:
    """The findings of the doctor in a loop.

    planted, found: names and lines of faults.
    code, output: exit code and text of the command.
    """

    name: str
    planted: set[Fault]
    found: set[Fault]
    code: int
    output: str

    @property
    def is_judged(self) -> bool:
        return NOT_JUDGED.search(self.output) is None

    @property
    def is_right(self) -> bool:
        return self.planted == self.found and self.code == int(bool(self.planted))


def paths(word: str = "") -> list[Path]:
    """The loops with this word in the name. Loops of Lightning need it installed."""
    found = [path for path in sorted(LOOPS.glob("*_*.py")) if word in path.stem]
    has_lightning = importlib.util.find_spec("lightning") is not None
    return [path for path in found if has_lightning or "lightning" not in modules_of(path)]


def modules_of(path: Path) -> set[str]:
    """The packages that a loop imports."""
    return set(re.findall(r"^(?:from|import) (\w+)", path.read_text(), re.MULTILINE))


def diagnose_loop(path: Path, *options: str) -> Result:
    """Run `gradacc doctor` on a loop, in this process."""
    planted = {
        (name, number)
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if (comment := FAULT.search(line))
        for name in comment[1].split(", ")
    }
    out, code, rng = io.StringIO(), 1, torch.get_rng_state()
    gc.freeze()  # the doctor collects garbage; without the modules of transformers, this is quick
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    try:
        with contextlib.redirect_stdout(out), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            main([*options, str(path)])
    except SystemExit as end:
        code = int(end.code or 0)
    except Exception:
        out.write(traceback.format_exc())
        code = 99
    gc.unfreeze()
    torch.set_rng_state(rng)
    output = out.getvalue()
    return Result(
        path.stem, planted, {(name, int(line)) for name, _, line in FINDING.findall(output)}, code, output
    )


def table(results: list[Result]) -> str:
    """The counts, and a line for each fault: planted, found at its line, missed, found where none is."""
    healthy = [each for each in results if each.name.startswith("healthy")]
    faulty = [each for each in results if not each.name.startswith("healthy")]
    lines = [
        "| loops | number | right | judged | not judged |",
        "|---|---|---|---|---|",
    ]
    for kind, some in (("healthy", healthy), ("faulty", faulty)):
        right, judged = sum(each.is_right for each in some), sum(each.is_judged for each in some)
        lines.append(f"| {kind} | {len(some)} | {right} | {judged} | {len(some) - judged} |")
    planted = Counter(name for each in results for name, _ in each.planted)
    found = Counter(name for each in results for name, _ in each.planted & each.found)
    wrong = Counter(name for each in results for name, _ in each.found - each.planted)
    lines += ["", "| fault | planted | found at its line | missed | found wrongly |", "|---|---|---|---|---|"]
    for name in sorted({*planted, *wrong}):
        missed = planted[name] - found[name]
        lines.append(f"| {name} | {planted[name]} | {found[name]} | {missed} | {wrong[name]} |")
    return "\n".join(lines)


if __name__ == "__main__":
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    results = [diagnose_loop(path) for path in paths(word)]
    if word:
        print(*(each.output for each in results), sep="\n")
    print(table(results))
    for each in results:
        if not each.is_right:
            missed, wrong = sorted(each.planted - each.found), sorted(each.found - each.planted)
            print(f"{each.name}: missed {missed}, found wrongly {wrong}, exit code {each.code}")
        elif not each.is_judged:
            print(f"{each.name}: not judged")
    sys.exit(not all(each.is_right for each in results))
