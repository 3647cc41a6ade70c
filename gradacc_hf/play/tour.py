"""A tour of the page in seven steps. Each step sets the controls, explains, and links lessons."""

from dataclasses import dataclass
from functools import cache
from html import escape

from gradacc_hf.lessons import question
from gradacc_hf.play.settings import WITH_BATCH_NORM, PlaySettings
from gradacc_hf.utils.paths import bundle_root


@dataclass(frozen=True)
class Step:
    """One step of the tour.

    title: heading.
    explanation: text of the step.
    watch: instructions for the reader.
    settings: settings of the run that the step begins.
    lessons: names of related lessons.
    """

    title: str
    explanation: str
    watch: str
    settings: PlaySettings
    lessons: tuple[str, ...]


STEPS = (
    Step(
        "Why memory runs out",
        "A forward pass keeps activations for the backward pass. Twice as many examples in a batch need "
        "twice as many activations. Weights, gradients and optimizer states keep their size. Here all 32 "
        "examples are one batch.",
        "Press <b>One window</b> and look at <b>Memory</b>: nearly all of it is activations.",
        PlaySettings(micro_batch=32, steps=1),
        ("memory",),
    ),
    Step(
        "Split the batch",
        "The same 32 examples are split into 8 micro-batches of 4. Examples of similar length share a "
        "micro-batch, so there is little padding. The examples of one optimizer step are called a "
        "<i>window</i>. The split does not change the result of the step.",
        "Press <b>One window</b>: in <b>Memory</b>, the upper bar is now much shorter than the lower bar.",
        PlaySettings(micro_batch=4, steps=8),
        ("eight_samples", "sixteen_to_sixtyfour"),
    ),
    Step(
        "Accumulate",
        "Each backward pass adds to the gradient of the passes before. After the last micro-batch, the "
        "accumulated gradient equals the gradient of the whole window, up to rounding.",
        "Press <b>One micro-batch</b> four times. The bucket fills to the dashed line, and the relative "
        "error falls below 1e-6.",
        PlaySettings(micro_batch=4, steps=4),
        ("when_to_step", "not_quite_the_same"),
    ),
    Step(
        "Divide by items, not by steps",
        "The loss is a mean over items. Here an item is a token to predict. A micro-batch of short "
        "sentences has few items. Dividing each loss by the number of accumulation steps gives all "
        "micro-batches the same weight, so the gradient is wrong.",
        "Press <b>Play</b>: this loop divides by steps. The bucket misses the dashed line, and the doctor "
        "prints the error. Set the lengths to <b>equal</b>, and this loop is right.",
        PlaySettings(fault="divided by steps, not items"),
        ("unequal_items",),
    ),
    Step(
        "Step and zero once per window",
        "The optimizer steps when the window is complete. Then the gradients are zeroed. This loop zeroes "
        "them before every backward pass, so it loses the gradients of all micro-batches but the last.",
        "Press <b>One micro-batch</b> several times: the bucket never fills. Press <b>Play</b>: the loss "
        "falls more slowly.",
        PlaySettings(fault="zeroed too early"),
        ("when_to_zero", "when_to_step"),
    ),
    Step(
        "The cost in time",
        "Each micro-batch runs a forward and a backward pass. Each pass has a fixed cost, whatever its "
        "size. Here each of the 16 micro-batches has one example, so nothing is padded.",
        "Press <b>Play</b>. After five windows, the text under <b>Memory</b> compares the times. Then set "
        "the accumulation steps to 2 and the micro-batch size to 8.",
        PlaySettings(micro_batch=1, steps=16),
        ("time",),
    ),
    Step(
        "The limits of accumulation",
        "BatchNorm normalises each example with the other examples of the micro-batch. No weighting of "
        "losses makes this equal to the whole window. In-batch negatives have the same limit. Use "
        "LayerNorm instead of BatchNorm, and a gradient cache for in-batch negatives.",
        "Press <b>One window</b>: the loop is correct, but the error is large. The two losses drift apart.",
        PlaySettings(model=WITH_BATCH_NORM),
        ("batch_norm", "contrastive"),
    ),
)


@cache
def page_of(number: int) -> str:
    """Return a step as HTML, counted from 0; for -1, the introduction."""
    if number < 0:
        return (
            "<p>Seven short steps show what gradient accumulation does and what it does not do. "
            "Each step runs in the loop below.</p>"
        )
    step = STEPS[number]
    lessons = "".join(_source(f"lessons/{name}", f"{name}: {question(name)}") for name in step.lessons)
    return (
        f"<h3>{number + 1} of {len(STEPS)}: {step.title}</h3><p>{step.explanation}</p><p>{step.watch}</p>"
        f"{lessons}{_source('minimal', 'The loop to copy, as in the README')}"
    )


def _source(name: str, title: str) -> str:
    text = (bundle_root() / f"recipes/{name}.py").read_text(encoding="utf-8")
    lesson = name.removeprefix("lessons/")
    run = f"gradacc lessons {lesson}" if lesson != name else f"gradacc cp {name} ."
    return (
        f"<details><summary>{escape(title)}</summary><p><code>{run}</code></p>"
        f"<pre>{escape(text)}</pre></details>"
    )
