"""`gradacc doctor SCRIPT`: run a script unchanged, and diagnose each training loop in it.

A loop is an optimizer, with the outermost module in training mode that holds parameters of this optimizer.
"""

import argparse
import runpy
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

from gradacc_hf.doctor import Diagnosis, diagnose
from gradacc_hf.doctor.frames import StartedLoader
from gradacc_hf.doctor.judgement import is_judged
from gradacc_hf.doctor.listener import Subscriber, subscribed
from gradacc_hf.doctor.record import LoopRecord
from gradacc_hf.doctor.report import NOT_OBSERVED, NOTHING_JUDGED, NOTHING_OBSERVED
from gradacc_hf.errors import InputError
from gradacc_hf.utils.commands import Parser


class StopHere(SystemExit):
    """Ends the script once its first loop has been diagnosed."""


@dataclass
class _Loop:
    """An optimizer that is being diagnosed, with the means to end the diagnosis."""

    diagnosis: Diagnosis
    optimizer: torch.optim.Optimizer
    parameters: frozenset[int]
    ending: ExitStack


class LoopFinder(Subscriber):
    """Finds the loops of a program and diagnoses them, several optimizers at a time.

    Optimizers are found when parameters are added to them, loaders when an iteration begins. A diagnosis
    begins with the first forward of a module that holds parameters of an optimizer. If the optimizer has made
    a step, the diagnosis ends when the diagnosis of another optimizer begins.

    say: called with each report; the same findings at the same line are reported once.
    stop: whether to raise StopHere once no optimizer is observed any more.
    settings: arguments of `diagnose`.
    """

    def __init__(self, say: Callable[[str], Any], stop: bool, settings: dict[str, Any]):
        self.diagnoses: list[Diagnosis] = []
        self._say, self._stop, self._settings = say, stop, settings
        self._optimizers: list[weakref.ref[torch.optim.Optimizer]] = []  # not yet diagnosed
        self._known: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self._started: list[StartedLoader] = []  # the latest
        self._reported: set[tuple[Any, ...]] = set()
        self._loops: list[_Loop] = []
        self.stepped_unseen: dict[int, str] = {}  # optimizers that stepped without a diagnosis

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Diagnose the loops in the `with` block."""
        hooks = [
            register_module_forward_pre_hook(self._before_forward),
            register_optimizer_step_post_hook(self._after_step),
        ]
        try:
            with subscribed(self), ExitStack() as self._ending:
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def loader_started(self, loader: StartedLoader) -> None:
        """Store the loader: a loop may iterate over it before the first forward."""
        self._started = [*self._started[-3:], loader]

    def optimizer_built(self, optimizer: torch.optim.Optimizer) -> None:
        """Store the optimizer until the loop begins."""
        if optimizer not in self._known:
            self._known.add(optimizer)
            self._optimizers.append(weakref.ref(optimizer))

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self.optimizer_built(optimizer)
        if any(reference() is optimizer for reference in self._optimizers):
            self.stepped_unseen[id(optimizer)] = type(optimizer).__name__
        self._stop_if_over()

    def _stop_if_over(self) -> None:
        """End the script once each optimizer that waits for a step was diagnosed."""
        self._drop_wrappers()
        is_over = any(diagnosis.is_over and diagnosis.record.windows for diagnosis in self.diagnoses)
        if self._stop and is_over and not any(diagnosis.is_waiting() for diagnosis in self.diagnoses):
            raise StopHere(0)

    def _drop_wrappers(self) -> None:
        """Drop optimizers that never step, or step inside the step of a wrapper, such as SAM's."""
        done = [loop for loop in self._loops if loop.diagnosis.record.windows]
        for loop in [each for each in self._loops if each not in done or done.index(each)]:
            same = [each for each in done if each is not loop and each.parameters == loop.parameters]
            is_inner = loop not in done or any(
                done.index(each) < done.index(loop) and _began_together(each, loop) for each in same
            )
            if same and is_inner:
                self._loops.remove(loop)
                self.diagnoses.remove(loop.diagnosis)
                loop.diagnosis.record.windows.clear()
                loop.ending.close()
                done = [each for each in done if each is not loop]

    def _before_forward(self, module: torch.nn.Module, inputs: Any) -> None:
        if torch.compiler.is_compiling() or not (module.training or torch.is_grad_enabled()):
            return  # no-grad forwards count: the first pass of a gradient cache needs the second's dropout
        if not self._optimizers:
            return
        of_module = {id(p) for p in module.parameters()}
        for reference in list(self._optimizers):
            optimizer = reference()
            if optimizer is None:
                self._optimizers.remove(reference)
            elif not of_module.isdisjoint(parameters := _parameters(optimizer)):
                self._optimizers.remove(reference)
                self._begin(module, optimizer, parameters)

    def _begin(
        self, module: torch.nn.Module, optimizer: torch.optim.Optimizer, parameters: frozenset[int]
    ) -> None:
        for loop in list(self._loops):
            if loop.diagnosis.is_over or loop.diagnosis.record.windows:  # this loop came before
                self._loops.remove(loop)
                loop.ending.close()
        diagnosis: list[Diagnosis] = []
        watched = diagnose(
            module,
            optimizer,
            say=lambda text: self._report(diagnosis[0], text),
            started_loaders=self._started,
            to_end=not self._stop,
            **self._settings,
        )
        ending = self._ending.enter_context(ExitStack())
        diagnosis.append(ending.enter_context(watched))
        self.stepped_unseen.pop(id(optimizer), None)
        self.diagnoses.append(diagnosis[0])
        self._loops.append(_Loop(diagnosis[0], optimizer, parameters, ending))

    def _report(self, diagnosis: Diagnosis, text: str) -> None:
        record = diagnosis.record
        if not record.windows:
            return
        names = (finding.name for finding in diagnosis.findings)
        what = (record.windows[0].micro_batches[0].place, record.optimizer, record.steps, *names)
        if what not in self._reported:
            self._reported.add(what)
            self._say(text)


def _parameters(optimizer: torch.optim.Optimizer) -> frozenset[int]:
    return frozenset(id(p) for group in optimizer.param_groups for p in group["params"])


def _began_together(one: _Loop, other: _Loop) -> bool:
    """Whether both had the same windows, because one steps inside the step of the other."""
    first, second = one.diagnosis.record.windows, other.diagnosis.record.windows
    return first[0].micro_batches[-1].terms == second[0].micro_batches[-1].terms


@contextmanager
def every_loop(
    say: Callable[[str], Any] = print, stop: bool = False, **settings: Any
) -> Iterator[list[Diagnosis]]:
    """Diagnose every loop in the `with` block. Yield the list of diagnoses.

    Args:
        say: called with each report; the same findings at the same line are reported once.
        stop: whether to raise StopHere after the first loop.
        settings: arguments of `diagnose`.
    """
    finder = LoopFinder(say, stop, settings)
    with finder.attached():
        yield finder.diagnoses
    seen = [diagnosis.record for diagnosis in finder.diagnoses]
    names = [record.optimizer for record in seen if record.unseen_steps and not record.windows]
    for name in sorted({*names, *finder.stepped_unseen.values()}):
        say(NOT_OBSERVED.format(name or "an optimizer"))
    for name in finder.stepped_unseen.values():
        finder.diagnoses.append(Diagnosis(LoopRecord(optimizer=name, unseen_steps=1), say))


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
    """Run the command. Exit with 1 if a loop has a fault; SystemExit of the script passes."""
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
    if not observed and not any(diagnosis.record.unseen_steps for diagnosis in found):
        print(NOTHING_OBSERVED)
        sys.exit(1)
    if not all(diagnosis.healthy for diagnosis in observed):
        sys.exit(1)
    if not any(is_judged(diagnosis.record) for diagnosis in observed):
        print(NOTHING_JUDGED)
    sys.exit(0)
