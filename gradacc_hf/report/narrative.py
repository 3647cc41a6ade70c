"""The sentences of a report: the verdict, and the format of numbers.

Names of contenders are bold, so that the end of a name such as "Trainer, by length" is visible.
"""

import math
import shlex
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from gradacc_hf.accumulation.noise_scale import MEASUREMENTS_NEEDED
from gradacc_hf.accumulation.noise_scale import in_words as in_words_of_noise
from gradacc_hf.accumulation.reference import EXACT
from gradacc_hf.report.runs import RecordedRun, RunGroup

SPACE = "\N{NO-BREAK SPACE}"  # between a number and its unit


@dataclass(frozen=True)
class Verdict:
    """The verdict of a report.

    sentences: the sentences.
    tone: "exact" if all contenders are exact, "off" if none is, else "".
    measure: how exactness was measured; "" if it was not.
    """

    sentences: list[Markup]
    tone: str
    measure: str


def verdict(found: Sequence[RunGroup]) -> Verdict:
    """Return which contenders are exact, and the speeds. If nothing was measured: the final metrics."""
    errors = {contender.label: worst_error(contender) for contender in found}
    measured = [contender for contender in found if errors[contender.label] is not None]
    if not measured:
        verified = [_verified(run) for c in found for run in c.runs if run.verification]
        sentences = [_metrics(found), *(verified or [_not_measured(found)]), _speed(found)]
        return Verdict([sentence for sentence in sentences if sentence], "", "")
    sentences = [_exactness(measured), _speed(found)]
    if len(measured) < len(found):
        others = _names([contender for contender in found if contender not in measured])
        sentences.insert(1, Markup("The gradients of {} were not measured.").format(others))
    precisions = {str(run.summary.get("precision") or "fp32") for c in measured for run in c.runs}
    ran_in = "" if precisions == {"fp32"} else f"; this ran in {in_words(sorted(precisions))}"
    return Verdict(
        [sentence for sentence in sentences if sentence],
        _tone([(errors[contender.label] or 0.0) <= EXACT for contender in measured]),
        "Errors are relative, ‖g − r‖ / ‖r‖. The reference r is the gradient of the window in one batch. "
        f"Exact means at most {error(EXACT)} in fp32{ran_in}.",
    )


def _tone(exact: Sequence[bool]) -> str:
    return "exact" if all(exact) else "" if any(exact) else "off"


def worst_error(contender: RunGroup) -> float | None:
    """Return the largest error of all windows of all repeats.

    Infinite if one is not finite; None if none was measured.
    """
    errors = [run.gradient_error for run in contender.runs if run.gradient_error is not None]
    return max((math.inf if math.isnan(error) else error for error in errors), default=None)


def _exactness(measured: Sequence[RunGroup]) -> Markup:
    errors = {contender.label: worst_error(contender) or 0.0 for contender in measured}
    exact = [contender for contender in measured if errors[contender.label] <= EXACT]
    off = [contender for contender in measured if contender not in exact]
    parts = []
    if exact:
        verb, whose = ("is", "its") if len(exact) == 1 else ("are", "their")
        worst = error(max(errors[contender.label] for contender in exact))
        sentence = "{} {} exact: {} gradients differ from the gradients of undivided windows by at most {}"
        parts.append(Markup(sentence).format(_names(exact), verb, whose, worst))
    if off:
        each = [Markup("{} by {}").format(_names([c]), error(errors[c.label])) for c in off]
        first = Markup("{} is not exact but off by {}").format(_names(off[:1]), error(errors[off[0].label]))
        parts.append(in_words([first, *each[1:]]))
        parts[-1] += " at worst"
    return Markup("; ").join(parts) + "."


def _metrics(found: Sequence[RunGroup]) -> Markup:
    """Return the final metrics and the baseline: all metrics of one contender, or one metric of several."""
    names = list(dict.fromkeys(name for c in found for run in c.runs for name in run.metrics("eval")))
    names = [name for name in names if name.partition("/")[0] not in names or "/" not in name]
    if not names:
        return Markup("No evaluation is recorded.")
    names.sort(key=lambda name: name == "loss")  # last
    baseline = next((b for c in found for run in c.runs if (b := run.metrics("baseline"))), {})
    before = next((b for c in found for run in c.runs if (b := run.before_training)), {})
    against = {name: _against(name, baseline, before) for name in names}
    if len(found) == 1:
        each = [f"{metric_name(name)} {_final(found[0], name)}{against.get(name, '')}" for name in names]
        return Markup("Final {}.").format(in_words(each))
    chosen = found[0].runs[0].setting("train", "best_metric")
    chief = chosen if chosen in names else names[0]
    with_it = [c for c in found if any(chief in run.metrics("eval") for run in c.runs)]
    each = [Markup("{} {}").format(_names([contender]), _final(contender, chief)) for contender in with_it]
    return Markup("Final {}: {}{}.").format(metric_name(chief), in_words(each), against.get(chief, ""))


def _against(name: str, baseline: Mapping[str, float], before: Mapping[str, float]) -> str:
    """Return what a metric is compared with: the model before training, if it was evaluated, and baseline."""
    parts = [f"before training {metric(before[name])}"] if name in before else []
    parts += [f"baseline {metric(baseline[name])}"] if name in baseline else []
    return f" ({', '.join(parts)})" if parts else ""


def _final(contender: RunGroup, name: str) -> str:
    """Return a metric of the final evaluations: 0.7552 (0.7500–0.7600)."""
    values = finite([run.metrics("eval").get(name) for run in contender.runs])
    return spread(values, metric) if values else metric(math.nan)


def metric_name(name: str) -> str:
    """Return the name of a metric; the loss of an evaluation is the validation loss."""
    return "validation loss" if name == "loss" else name


def metric_title(name: str) -> str:
    """Return the name of a metric as a title: "Recall at 1"."""
    metric, slash, source = metric_name(name).partition("/")
    words = metric.replace("logprob", "log-probability").replace("_", " ")
    return ("KL from the reference" if metric == "kl" else words[:1].upper() + words[1:]) + slash + source


def _verified(run: RecordedRun) -> Markup:
    """Return the verdict of `gradacc verify --run` on the model and data of a run."""
    found = Markup("<b>{}</b>, by <code>gradacc verify</code> before training: {}")
    return found.format(run.name, run.verification)


def _not_measured(found: Sequence[RunGroup]) -> Markup:
    command = f"gradacc verify --run {shlex.quote(str(found[0].runs[0].folder))}"
    which = "this run" if len(found) == 1 and len(found[0].runs) == 1 else "these runs"
    text = "Whether gradients are exact was not measured in {}. To measure it: <code>{}</code>"
    return Markup(text).format(which, command)


DATA_SETTINGS = ("train", "config_name", "max_length", "max_target_length", "packing")
"""Settings of `data` that change the lengths of examples."""


def _speed(found: Sequence[RunGroup]) -> Markup | None:
    """Return the speed of the first contender over the speed of each other, in examples per second.

    Where the examples differ, the sentence states the setting instead of a ratio.
    """
    first, *others = found
    parts: list[Markup] = []
    apart: dict[Markup, list[RunGroup]] = {}  # differences → the contenders that have them
    for other in others:
        if not (ratios := speed_ratios(first, other)):
            continue
        if differences := _data_differences(first, other):
            apart.setdefault(in_words(differences), []).append(other)
            continue
        times, _, around = spread(ratios, lambda ratio: f"{ratio:.1f}").partition(" ")
        as_many = "as" if parts else "as many examples as"
        part = Markup("{}{}× {} {} {}").format(times, SPACE, as_many, _names([other]), around)
        parts.append(part.rstrip())
    note = Markup("The speeds of {} and {} cannot be compared, as their examples differ: {}.")
    sentences = [note.format(_names([first]), _names(others), how) for how, others in apart.items()]
    if parts:
        pairs = len(first.runs) if all(_paired(first, other) for other in others) else 1
        medians = f" (medians of {pairs} pairs of runs)" if pairs > 1 else ""
        sentence = Markup("Per second, {} trains {}{}.").format(_names([first]), in_words(parts), medians)
        sentences.insert(0, sentence)
    return Markup(" ").join(sentences) if sentences else None


def _data_differences(first: RunGroup, other: RunGroup) -> list[str]:
    """Return the settings that change the examples and differ: "data.max_length 128 against 64"."""
    found = []
    for key in DATA_SETTINGS:
        mine, theirs = ([run.setting("data", key) for run in group.runs] for group in (first, other))
        if {*map(repr, mine)} != {*map(repr, theirs)}:
            values = [*mine, *theirs]
            is_short = len(mine) == len(theirs) == 1 and not any(isinstance(v, list | dict) for v in values)
            found.append(f"data.{key} {mine[0]} against {theirs[0]}" if is_short else f"another data.{key}")
    return found


def _paired(first: RunGroup, other: RunGroup) -> bool:
    """Whether both have the same seeds, run by run."""
    return [run.seed for run in first.runs] == [run.seed for run in other.runs]


def speed_ratios(first: RunGroup, other: RunGroup) -> list[float]:
    """Return ratios of examples per second: one for each pair of repeats; without pairs, of the medians."""
    mine, theirs = ([run.examples_per_second for run in contender.runs] for contender in (first, other))
    if not _paired(first, other):
        mine, theirs = ([statistics.median(finite(v))] if finite(v) else [] for v in (mine, theirs))
    return [a / b for a, b in zip(mine, theirs, strict=False) if math.isfinite(a) and b > 0]


def _names(contenders: Sequence[RunGroup]) -> Markup:
    return in_words([Markup("<b>{}</b>").format(contender.label) for contender in contenders])


def in_words(parts: Sequence[Any]) -> Markup:
    """Return "a, b and c"."""
    *most, last = [Markup.escape(part) for part in parts]
    return Markup(", ").join(most) + Markup(" and ") + last if most else last


def finite(values: Sequence[float | None]) -> list[float]:
    """Return the finite values."""
    return [value for value in values if value is not None and math.isfinite(value)]


def spread(values: Sequence[float], show: Callable[[float], str]) -> str:
    """Return the median, and the range if it is not one value as displayed: 512 MiB (500–520 MiB)."""
    least, middle, most = (show(reduce(values)) for reduce in (min, statistics.median, max))
    if least == most:
        return middle
    unit = most.partition(SPACE)[2]
    return f"{middle} ({least.removesuffix(SPACE + unit) if unit else least}–{most})"


def metric(value: float) -> str:
    """Return "0.7552"."""
    return f"{value:.4f}" if math.isfinite(value) else "not finite"


def error(value: float) -> str:
    """Return "3e-7", "0.42" or "5.1"."""
    if not math.isfinite(value):
        return "NaN or infinity"
    if value == 0 or 0.01 <= value < 1e4:
        return f"{value:.2g}"
    mantissa, exponent = f"{value:.0e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def noise(found: Sequence[RunGroup]) -> list[Markup]:
    """Return a sentence for each contender: advice on the size of its windows, by the final noise scale."""
    sentences = []
    for contender in found:
        run = contender.runs[0]
        low, high = run.noise_interval
        if run.noise_measurements < MEASUREMENTS_NEEDED:
            continue
        if math.isnan(low):
            text = "no advice on the size of windows: the run records no interval of the gradient noise scale"
        else:
            text = in_words_of_noise(low, high, int(run.window_size), run.noise_measurements)
        whose = "" if len(found) == 1 else Markup("<b>{}</b>: ").format(contender.label)
        sentences.append(Markup("{}{}{}.").format(whose, text[0].upper(), text[1:]))
    return sentences


def figure(value: float) -> str:
    """Return "0.83", "12" or "1,240"."""
    return f"{value:.2g}" if value < 10 else count(value)


def count(value: float) -> str:
    """Return "17,592"."""
    return f"{value:,.0f}"


def speed(value: float) -> str:
    """Return "14.2" or "2,140"."""
    return f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"


def percent(value: float) -> str:
    """Return "13.2 %"."""
    return f"{100 * value:.1f}{SPACE}%"


def memory(value: float) -> str:
    """Return "512 MiB" or "11.3 GiB"."""
    return f"{value / 2**20:,.0f}{SPACE}MiB" if value < 10 * 2**30 else f"{value / 2**30:,.1f}{SPACE}GiB"
