"""`gradacc doctor SCRIPT`: run a script as it is, and diagnose each loop in it.

A loop is an optimizer with the outermost module that is run, in training, with parameters of it.
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
from torch.utils.data import DataLoader

from gradacc_hf.doctor import NOTHING_SEEN, Diagnosis, diagnose
from gradacc_hf.doctor.observer import loaders_begun
from gradacc_hf.errors import InputError
from gradacc_hf.utils.commands import Parser


class StopHere(SystemExit):
    """Ends the script where its first loop has been diagnosed."""


@contextmanager
def every_loop(
    say: Callable[[str], Any] = print, stop: bool = False, **settings: Any
) -> Iterator[list[Diagnosis]]:
    """Diagnose every loop that is run in here, one after the other; `settings` go to `diagnose`.

    What is found again at the same line is said once. `stop`: raise StopHere where the first one is known.
    """
    optimizers: list[Any] = []
    diagnoses: list[Diagnosis] = []
    begun: list[DataLoader] = []
    make, known, said = torch.optim.Optimizer.__init__, set(), set()

    def made(optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> None:
        make(optimizer, *args, **kwargs)
        optimizers.append(weakref.ref(optimizer))

    def begins_data(loader: DataLoader) -> None:
        begun[:] = [loader]

    def say_once(report: str) -> None:
        seen = diagnoses[-1].seen
        if not seen.windows:
            return
        what = (seen.windows[0].micro_batches[0].place, seen.steps, *(f.name for f in diagnoses[-1].findings))
        if what not in said:
            said.add(what)
            say(report)

    def begins(module: torch.nn.Module, inputs: Any) -> None:
        if not module.training or torch.compiler.is_compiling():
            return  # without gradients it may be a first pass, which must meet the dropout of the second
        if stop and diagnoses and diagnoses[-1].is_over:
            raise StopHere(0)
        new = [o for ref in optimizers if (o := ref()) is not None and id(o) not in known]
        of_module = {id(p) for p in module.parameters()} if new else set()
        for optimizer in new:
            if any(id(p) in of_module for group in optimizer.param_groups for p in group["params"]):
                known.add(id(optimizer))
                loop.close()  # the one before
                watched = diagnose(module, optimizer, say=say_once, begun=begun, **settings)
                diagnoses.append(loop.enter_context(watched))
                return

    torch.optim.Optimizer.__init__ = made  # type: ignore[method-assign]
    hook = register_module_forward_pre_hook(begins)
    try:
        with loaders_begun(begins_data), ExitStack() as loop:
            yield diagnoses
    finally:
        torch.optim.Optimizer.__init__ = make  # type: ignore[method-assign]
        hook.remove()


def run_script(script: Path, arguments: Sequence[str], **settings: Any) -> list[Diagnosis]:
    """Run a script as `python script arguments` would, and diagnose its loops; what it raises is raised."""
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
    """The command line. Exits with 1 where something is wrong with a loop, else as the script does."""
    parser = Parser(
        prog="gradacc doctor",
        description="Run a training script as it is, and say what is wrong with its gradient accumulation.",
    )
    parser.add_argument(
        "--windows", type=int, default=3, help="compared with themselves at once (%(default)s)"
    )
    parser.add_argument(
        "--accumulation-steps", type=int, help="what the script is meant to do, if it is unclear"
    )
    parser.add_argument("--stop", action="store_true", help="end the script when its first loop is known")
    parser.add_argument("script", type=Path, help="a Python file")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the script's own")
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
            f"doctor: {given.script} has run no model in training whose parameters an optimizer of torch "
            "has: nothing to diagnose"
        )
    seen = [diagnosis for diagnosis in found if diagnosis.seen.windows]
    if not seen:
        print(NOTHING_SEEN)
    sys.exit(0 if seen and all(diagnosis.healthy for diagnosis in seen) else 1)
