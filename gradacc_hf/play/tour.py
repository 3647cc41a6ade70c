"""A tour of the page in seven steps. Each sets the controls, names what to watch, and links lessons."""

from dataclasses import dataclass
from functools import cache
from html import escape

from gradacc_hf.lessons import question
from gradacc_hf.play.settings import WITH_BATCH_NORM, PlaySettings
from gradacc_hf.utils.paths import bundle_root


@dataclass(frozen=True)
class Step:
    """One stop of the tour."""

    title: str
    says: str
    watch: str
    settings: PlaySettings
    lessons: tuple[str, ...]


STEPS = (
    Step(
        "Why memory runs out",
        "A forward keeps activations for its backward, and a batch of twice as many examples keeps "
        "twice as many. Weights, gradients and the optimizer's states stay as they are. Here all 32 "
        "examples go at once.",
        "Go on by <b>one window</b>, and look at <b>memory</b>: nearly all of it are activations.",
        PlaySettings(micro_batch=32, steps=1),
        ("memory",),
    ),
    Step(
        "Split the batch",
        "The same 32 examples, split into 8 micro-batches of 4, by length, so that each pads little. "
        "One optimizer step is a <i>window</i>; how it is split does not change the mathematics.",
        "Go on by <b>one window</b>: the upper bar in <b>memory</b> has shrunk, for the same 32 examples.",
        PlaySettings(micro_batch=4, steps=8),
        ("eight_samples", "sixteen_to_sixtyfour"),
    ),
    Step(
        "Accumulate",
        "A backward adds to the gradients that are there. So the gradient of the window comes "
        "together micro-batch by micro-batch. After the last it equals the gradient of the whole window, "
        "up to rounding.",
        "Go on by <b>one micro-batch</b>, four times: the bucket fills to the dashed line, and the "
        "relative error falls to less than a millionth.",
        PlaySettings(micro_batch=4, steps=4),
        ("when_to_step", "not_quite_the_same"),
    ),
    Step(
        "Divide by items, not by steps",
        "A loss is a mean over items: here, tokens to predict. Micro-batches of short sentences have "
        "few. To divide each loss by the number of steps counts them all alike, and makes another "
        "gradient of it.",
        "<b>Play</b>: this loop divides by steps. The bucket ends elsewhere; the doctor says by how "
        "much; with lengths <b>equal</b>, all would be well.",
        PlaySettings(fault="divided by steps, not items"),
        ("unequal_items",),
    ),
    Step(
        "Step and zero once a window",
        "The optimizer steps, and gradients are zeroed, when the window is complete. This loop zeroes "
        "before every backward: whatever the first micro-batches have found is thrown away.",
        "Go on by <b>one micro-batch</b>: the bucket never fills. <b>Play</b>: it learns from little.",
        PlaySettings(fault="zeroed too early"),
        ("when_to_zero", "when_to_step"),
    ),
    Step(
        "What it costs in time",
        "Each micro-batch is a forward and a backward of its own, with what these cost whatever their "
        "size. Here 16 micro-batches have an example each, and nothing is padded.",
        "<b>Play</b>, and look at the last words under <b>memory</b>: the time by that of the window "
        "at once. Then set the steps to 2, and the micro-batch size to 8.",
        PlaySettings(micro_batch=1, steps=16),
        ("time",),
    ),
    Step(
        "What it does not fix",
        "BatchNorm normalises an example by those beside it in its micro-batch: no way of weighing "
        "losses makes a window of that. In-batch negatives are split in the same way. Use LayerNorm; "
        "for negatives, a gradient cache.",
        "Go on by <b>one window</b>: the loop is right, and the error is large. The two losses drift apart.",
        PlaySettings(model=WITH_BATCH_NORM),
        ("batch_norm", "contrastive"),
    ),
)


@cache
def page_of(number: int) -> str:
    """A step as HTML, counted from 0; for −1 the introduction."""
    if number < 0:
        return "<p>What does accumulation do, and what not? Seven short steps, each on the loop below.</p>"
    step = STEPS[number]
    lessons = "".join(_source(f"lessons/{name}", f"{name}: {question(name)}") for name in step.lessons)
    return (
        f"<h3>{number + 1} of {len(STEPS)}: {step.title}</h3><p>{step.says}</p><p>{step.watch}</p>"
        f"{lessons}{_source('minimal', 'the loop to copy, as in the README')}"
    )


def _source(name: str, title: str) -> str:
    text = (bundle_root() / f"recipes/{name}.py").read_text(encoding="utf-8")
    lesson = name.removeprefix("lessons/")
    run = f"gradacc lessons {lesson}" if lesson != name else f"gradacc cp {name} ."
    return (
        f"<details><summary>{escape(title)}</summary><p><code>{run}</code></p>"
        f"<pre>{escape(text)}</pre></details>"
    )
