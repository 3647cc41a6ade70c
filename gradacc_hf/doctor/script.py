"""`gradacc doctor SCRIPT`: run a script unchanged, and diagnose each training loop in it.

A loop is an optimizer, with the outermost module in training mode that holds parameters of this optimizer.
"""

import argparse
import runpy
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader

from gradacc_hf.doctor import Diagnosis, diagnose
from gradacc_hf.doctor.listener import Subscriber, subscribed
from gradacc_hf.doctor.report import NOTHING_OBSERVED
from gradacc_hf.errors import InputError
from gradacc_hf.utils.commands import Parser


class StopHere(SystemExit):
    """Ends the script once its first loop has been diagnosed."""


class LoopFinder(Subscriber):
    """Finds the loops of a program and diagnoses one after the other.

    Optimizers are found when parameters are added to them, loaders when an iteration begins. A loop begins
    with the first forward of a module that holds parameters of an optimizer not yet diagnosed.

    say: called with each report; the same findings at the same line are reported once.
    stop: whether to raise StopHere after the first diagnosis.
    settings: arguments of `diagnose`.
    """

    def __init__(self, say: Callable[[str], Any], stop: bool, settings: dict[str, Any]):
        self.diagnoses: list[Diagnosis] = []
        self._say, self._stop, self._settings = say, stop, settings
        self._optimizers: list[weakref.ref[torch.optim.Optimizer]] = []  # not yet diagnosed
        self._known: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self._started: list[DataLoader] = []  # the latest
        self._reported: set[tuple[Any, ...]] = set()
        self._loop = ExitStack()  # of the current diagnosis

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Diagnose the loops in the `with` block."""
        hooks = [
            register_module_forward_pre_hook(self._before_forward),
            register_optimizer_step_post_hook(lambda optimizer, *_: self.optimizer_built(optimizer)),
        ]
        try:
            with subscribed(self), self._loop:
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def loader_started(self, loader: DataLoader) -> None:
        """Store the loader: a loop may iterate over it before the first forward."""
        self._started = [loader]

    def optimizer_built(self, optimizer: torch.optim.Optimizer) -> None:
        """Store the optimizer until the loop begins."""
        if optimizer not in self._known:
            self._known.add(optimizer)
            self._optimizers.append(weakref.ref(optimizer))

    def _before_forward(self, module: torch.nn.Module, inputs: Any) -> None:
        if not module.training or torch.compiler.is_compiling():
            return  # no-grad forwards count: the first pass of a gradient cache needs the second's dropout
        if self._stop and self.diagnoses and self.diagnoses[-1].is_over:
            raise StopHere(0)
        if not self._optimizers:
            return
        of_module = {id(p) for p in module.parameters()}
        for reference in list(self._optimizers):
            optimizer = reference()
            if optimizer is None:
                self._optimizers.remove(reference)
            elif any(id(p) in of_module for group in optimizer.param_groups for p in group["params"]):
                self._optimizers.remove(reference)
                self._loop.close()  # the diagnosis of the loop before
                watched = diagnose(
                    module, optimizer, say=self._report, started_loaders=self._started, **self._settings
                )
                self.diagnoses.append(self._loop.enter_context(watched))
                return

    def _report(self, text: str) -> None:
        diagnosis = self.diagnoses[-1]
        windows = diagnosis.record.windows
        if not windows:
            return
        names = (finding.name for finding in diagnosis.findings)
        what = (windows[0].micro_batches[0].place, diagnosis.record.steps, *names)
        if what not in self._reported:
            self._reported.add(what)
            self._say(text)


@contextmanager
def every_loop(
    say: Callable[[str], Any] = print, stop: bool = False, **settings: Any
) -> Iterator[list[Diagnosis]]:
    """Diagnose every loop in the `with` block, one after the other. Yield the list of diagnoses.

    Args:
        say: called with each report; the same findings at the same line are reported once.
        stop: whether to raise StopHere after the first diagnosis.
        settings: arguments of `diagnose`.
    """
    finder = LoopFinder(say, stop, settings)
    with finder.attached():
        yield finder.diagnoses


def run_script(script: Path, arguments: Sequence[str], **settings: Any) -> list[Diagnosis]:
    """Run a script as `python script arguments` does, and diagnose its loops. Exceptions propagate."""
    before, path = sys.argv, sys.path[0]
    sys.argv, sys.path[0] = [str(script), *arguments], str(script.parent.resolve())
    try:
        with every_loop(**settings) as diagnoses:
            runpy.run_path(str(script), run_name="__main__")
    except StopHere:
        pass
    finally:
        sys.argv, sys.path[0] = before, path
    return diagnoses


def main(argv: Sequence[str]) -> None:
    """Run the command. Exit with 0 if all loops are healthy, else with 1; SystemExit of the script passes."""
    parser = Parser(
        prog="gradacc doctor",
        description="Run a training script unchanged, and report faults of its gradient accumulation.",
    )
    parser.add_argument(
        "--windows",
        type=int,
        default=3,
        help="number of windows to compare with one large batch (default: %(default)s)",
    )
    parser.add_argument(
        "--accumulation-steps",
        type=int,
        help="the intended number of micro-batches per window",
    )
    parser.add_argument(
        "--stop", action="store_true", help="end the script after the diagnosis of the first loop"
    )
    parser.add_argument("script", type=Path, help="the Python file that trains")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of the script")
    given = parser.parse_args(argv)
    if not given.script.is_file():
        raise InputError(f"doctor: no file {given.script}; give the Python file that trains")
    for name, number in (("--windows", given.windows), ("--accumulation-steps", given.accumulation_steps)):
        if number is not None and number < 1:
            raise InputError(f"{name}: found {number}; allowed: 1 or more")
    found = run_script(
        given.script,
        given.arguments,
        windows=given.windows,
        accumulation_steps=given.accumulation_steps,
        stop=given.stop,
    )
    if not found:
        raise InputError(
            f"doctor: {given.script} trained no model with a torch optimizer, so there is nothing to diagnose"
        )
    observed = [diagnosis for diagnosis in found if diagnosis.record.windows]
    if not observed:
        print(NOTHING_OBSERVED)
    sys.exit(0 if observed and all(diagnosis.healthy for diagnosis in observed) else 1)
