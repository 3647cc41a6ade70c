"""The loops that the page shows: gradacc's loop, as in the README, and the classic loop with each mistake.

Each loop is a generator that yields after "forward", "backward", "clip", "step" and "zero", and at the "end"
of a window. "skipped" means that Accelerate skipped a step or a zero_grad: the window is not complete.
`shown` returns the lines of a loop without the yields. `line` returns the latest line.

The windows of gradacc's loop come from `WindowLoader`. The windows of the classic loop are lists of pairs:
a batch, and the batch's share of the window's items. Apart from the mistake, the classic loop is exact.
"""

import inspect
import textwrap
from collections.abc import Callable, Generator
from typing import Any, Literal

from torch.nn.utils import clip_grad_norm_

Stop = Literal["forward", "backward", "clip", "step", "zero", "skipped", "end"]
Loop = Callable[..., Generator[Stop, None, None]]


def ours(model, optimizer, scheduler, windows, accelerator, max_norm):
    for window in windows:  # one window is one optimizer step
        for batch in window:  # this process's micro-batches
            with accelerator.accumulate(model):
                loss = model(**batch).loss  # a mean over the micro-batch's items
                yield "forward"
                accelerator.backward(window.weigh(loss))
                yield "backward"
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), max_norm)
                    yield "clip"
                optimizer.step()
                yield "step" if accelerator.sync_gradients else "skipped"
                optimizer.zero_grad()
                yield "zero" if accelerator.sync_gradients else "skipped"
        scheduler.step()
        yield "end"


def zeroed_too_early(model, optimizer, scheduler, windows, accelerator, max_norm):
    for window in windows:
        for batch, share in window:  # share of the window's items
            optimizer.zero_grad()  # ✗ deletes the gradient so far
            yield "zero"
            loss = model(**batch).loss
            yield "forward"
            (loss * share).backward()
            yield "backward"
        clip_grad_norm_(model.parameters(), max_norm)
        yield "clip"
        optimizer.step()
        yield "step"
        scheduler.step()
        yield "end"


def stepped_every_micro_batch(model, optimizer, scheduler, windows, accelerator, max_norm):
    for window in windows:
        for batch, share in window:  # share of the window's items
            loss = model(**batch).loss
            yield "forward"
            (loss * share).backward()
            yield "backward"
            clip_grad_norm_(model.parameters(), max_norm)
            yield "clip"
            optimizer.step()  # ✗ the window is not complete
            yield "step"
            optimizer.zero_grad()
            yield "zero"
        scheduler.step()
        yield "end"


def not_divided(model, optimizer, scheduler, windows, accelerator, max_norm):
    for window in windows:
        for batch, _ in window:
            loss = model(**batch).loss
            yield "forward"
            loss.backward()  # ✗ a sum of means, not a mean
            yield "backward"
        clip_grad_norm_(model.parameters(), max_norm)
        yield "clip"
        optimizer.step()
        yield "step"
        optimizer.zero_grad()
        yield "zero"
        scheduler.step()
        yield "end"


def divided_by_steps(model, optimizer, scheduler, windows, accelerator, max_norm):
    for window in windows:
        for batch, _ in window:
            loss = model(**batch).loss
            yield "forward"
            (loss / len(window)).backward()  # ✗ ignores the number of items
            yield "backward"
        clip_grad_norm_(model.parameters(), max_norm)
        yield "clip"
        optimizer.step()
        yield "step"
        optimizer.zero_grad()
        yield "zero"
        scheduler.step()
        yield "end"


def scheduled_every_micro_batch(model, optimizer, scheduler, windows, accelerator, max_norm):
    for window in windows:
        for batch, share in window:  # share of the window's items
            loss = model(**batch).loss
            yield "forward"
            (loss * share).backward()
            yield "backward"
            scheduler.step()  # ✗ lowers the learning rate too early
        clip_grad_norm_(model.parameters(), max_norm)
        yield "clip"
        optimizer.step()
        yield "step"
        optimizer.zero_grad()
        yield "zero"
        yield "end"


FAULTS: dict[str, Loop] = {
    "zeroed too early": zeroed_too_early,
    "step on every micro-batch": stepped_every_micro_batch,
    "not divided": not_divided,
    "divided by steps, not items": divided_by_steps,
    "scheduler on every micro-batch": scheduled_every_micro_batch,
}


def shown(loop: Loop) -> list[str]:
    """Return the lines of the body, without the yields."""
    return [text for _, text in _lines(loop)]


def line(loop: Loop, running: Any) -> int | None:
    """Return the index of the latest line in `shown`; None before the first line."""
    if running.gi_frame is None:
        return None
    now = running.gi_frame.f_lineno
    done = [i for i, (number, _) in enumerate(_lines(loop)) if number < now]
    return done[-1] if done else None


def _lines(loop: Loop) -> list[tuple[int, str]]:
    lines, first = inspect.getsourcelines(loop)
    body = textwrap.dedent("".join(lines[1:])).splitlines()
    numbered = enumerate(body, start=first + 1)
    return [(number, text) for number, text in numbered if not text.strip().startswith("yield ")]
