"""Draw a `Picture` of a session as HTML, with SVG in the colours of the page.

The palette of Okabe and Ito is distinct for colour-blind readers. No fact depends on colour alone: padding is
hatched, lines differ in their dashes, and ✗ marks errors.
"""

import math
from collections.abc import Sequence
from html import escape

from gradacc_hf.play.model_runner import WINDOWS
from gradacc_hf.play.session import DIAGNOSED_WINDOWS, MicroBatchShape, Picture, Who

LINES: dict[Who, tuple[str, str, str]] = {  # name, class, dashes
    "at once": ("one large batch", "at-once", ""),
    "ours": ("gradacc's loop", "ours", "7 4"),
    "shown": ("this loop", "shown", "2 3"),
}
HATCHED = (
    '<pattern id="{0}" width="5" height="5" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
    '<rect width="5" height="5" class="{1}"/><line x1="0" y1="0" x2="0" y2="5" class="hatch"/></pattern>'
)
WIDTH_UNITS = 430.0  # width of each picture, in units of the SVG
LABEL_WIDTH, LABEL_HEIGHT = 20.0, 14.0  # space of a number of two digits


def code(picture: Picture) -> str:
    """Return the lines of the loop, with the latest line marked."""
    lines = []
    for number, text in enumerate(picture.code):
        line, sign, comment = text.partition("  # ")
        now = number == picture.line
        body = line.lstrip()
        said = escape(body).replace("(", "(<wbr>") or " "
        if sign:
            wrong = " wrong" * comment.startswith("✗")
            said += f'<span class="comment{wrong}">  # {escape(comment)}</span>'
        if now and picture.stop == "skipped":
            said += "<em>  ← does nothing yet: the window is not complete</em>"
        current = ' aria-current="step"' if now else ""
        kind = "line now" if now else "line"
        indent = f'<span class="indent">{line[: len(line) - len(body)]}</span>'
        mark = f"<i>{'▶' if now else ' '}</i>"
        lines.append(f'<div class="{kind}"{current}>{mark}{indent}<span class="text">{said}</span></div>')
    return f'<div class="code" role="img" aria-label="the loop">{"".join(lines)}</div>'


def window(picture: Picture) -> str:
    """Draw the window: one block for each micro-batch, one row for each example, with tokens and padding."""
    width, height, gap = WIDTH_UNITS, 96.0, 5.0
    across = sum(cell.padded_to for cell in picture.cells)
    scale = (width - gap * (len(picture.cells) - 1)) / across
    drawn, x, labelled = [HATCHED.format("padding", "ground")], 0.0, -LABEL_WIDTH
    for number, cell in enumerate(picture.cells):
        wide, high = cell.padded_to * scale, height / len(cell.tokens)
        state = "done" if number < picture.done else "coming"
        drawn.append(
            f'<g class="{state}"><rect class="frame" x="{x:.1f}" width="{wide:.1f}" height="{height}"/>'
        )
        drawn.append(f'<rect fill="url(#padding)" x="{x:.1f}" width="{wide:.1f}" height="{height}"/>')
        for row, tokens in enumerate(cell.tokens):
            size = f'width="{tokens * scale:.1f}" height="{max(0.6, high - 0.8):.1f}"'
            drawn.append(f'<rect class="tokens" x="{x:.1f}" y="{row * high + 0.4:.1f}" {size}/>')
        middle = x + wide / 2
        if middle - labelled > LABEL_WIDTH and middle + LABEL_WIDTH / 2 < width:
            drawn.append(f'<text x="{middle:.1f}" y="{height + 15}">{number + 1}</text>')
            labelled = middle
        drawn.append("</g>")
        x += wide + gap
    examples = picture.settings.effective
    padding = f" {_padding(picture.cells):.0%} of the tokens are padding." * (
        max(cell.padded_to for cell in picture.cells) > 1
    )
    found = sum(len(cell.tokens) for cell in picture.cells)
    text = (
        f"Window <b data-number=window>{picture.window + 1}</b> of {WINDOWS}: {found} examples"
        f"{'' if found == examples else f' (the rest of the data set; usually {examples})'} "
        f"in {len(picture.cells)} micro-batch{'es' * (len(picture.cells) > 1)}, "
        f"<b data-number=done>{picture.done}</b> done.{padding}"
    )
    return _figure("The window", text, f"0 0 {width:.0f} {height + 20:.0f}", drawn)


def bucket(picture: Picture) -> str:
    """Draw the norm of the accumulated gradient as the level of a bucket, beside the reference.

    The reference is the gradient of the window as one batch.
    """
    finite = [norm for norm in (*picture.norms, picture.whole_norm) if math.isfinite(norm)]
    top = 1.15 * max(finite, default=1.0) or 1.0
    drawn, bottom, tall = [], 128.0, 116.0
    level = 0.0 if picture.is_empty or not picture.norms else picture.norms[-1]
    for x, kind, value in ((60, _kind(picture), level), (260, "at-once", picture.whole_norm)):
        high = tall * min(1.0, value / top) if math.isfinite(value) else tall
        drawn.append(
            f'<rect class="fill {kind}" x="{x}" y="{bottom - high:.1f}" width="120" height="{high:.1f}"/>'
        )
        drawn.append(f'<path class="bucket" d="M{x} 8 V{bottom} H{x + 120} V8"/>')
    target = bottom - tall * picture.whole_norm / top if math.isfinite(picture.whole_norm) else bottom
    drawn.append(f'<line class="target" x1="60" x2="410" y1="{target:.1f}" y2="{target:.1f}"/>')
    last = -20.0
    for number, value in enumerate(picture.norms, start=1):  # a mark after each micro-batch
        y = bottom - tall * min(1.0, value / top) if math.isfinite(value) else bottom - tall
        drawn.append(f'<line class="mark" x1="52" x2="60" y1="{y:.1f}" y2="{y:.1f}"/>')
        if abs(y - last) > LABEL_HEIGHT:
            drawn.append(f'<text class="at" x="48" y="{y + 4:.1f}">{number}</text>')
            last = y
    drawn.append('<text x="120" y="147">accumulated gradient</text>')
    drawn.append('<text x="320" y="147">window as one batch</text>')
    now = _number(picture.norms[-1]) if picture.norms else "0"
    zeroed = " (now zeroed)" if picture.is_empty and picture.norms else ""
    text = (
        f"Norm: <b data-number=norm>{now}</b> accumulated{zeroed}, "
        f"<b data-number=whole>{_number(picture.whole_norm)}</b> as one batch; relative error "
        f"<b data-number=error>{_error(picture.error)}</b>{_verdict(picture)}"
    )
    return _figure("The gradient", text, f"0 0 {WIDTH_UNITS:.0f} 152", drawn)


def _verdict(picture: Picture) -> str:
    if picture.done < len(picture.cells):
        return " so far."
    if picture.has_diverged:
        return ': <span class="bad">✗ the training has diverged</span>.'
    right = picture.is_right
    said = "✓ equal" if right else "✗ not equal"
    most = picture.settings.max_grad_norm
    clipped = f" The optimizer step uses it clipped to norm {most:g}." if 0 < most < picture.norms[-1] else ""
    return f': <span class="{"right" if right else "bad"}">{said}</span>.{clipped}'


def memory(picture: Picture) -> str:
    """Draw bytes as stacked bars: for micro-batches, and for the window as one batch."""
    held, width = picture.memory, 250.0
    kept = {"parameters": held.parameters, "gradients": held.gradients, "optimizer": held.optimizer}
    bars = (
        ("micro-batch", {**kept, "activations": held.activations}),
        ("one batch", {**kept, "activations": held.activations_at_once}),
    )
    most = max(sum(parts.values()) for _, parts in bars) or 1
    drawn = [HATCHED.format(f"held-{i}", f"part-{i}") for i in (1, 3)]
    for row, (name, parts) in enumerate(bars):
        x, y = 98.0, 6 + 34 * row
        drawn.append(f'<text class="at" x="92" y="{y + 17}">{name}</text>')
        for i, size in enumerate(parts.values()):
            wide = width * size / most
            fill = f'fill="url(#held-{i})"' if i in (1, 3) else f'class="part-{i}"'
            drawn.append(f'<rect {fill} x="{x:.1f}" y="{y}" width="{wide:.1f}" height="25"/>')
            x += wide
        drawn.append(f'<text class="left" x="{x + 5:.1f}" y="{y + 17}">{_bytes(sum(parts.values()))}</text>')
    for i, name in enumerate(kept | {"activations": 0}):
        x = 6 + 108 * i
        fill = f'fill="url(#held-{i})"' if i in (1, 3) else f'class="part-{i}"'
        drawn.append(f'<rect {fill} x="{x}" y="80" width="12" height="12"/>')
        drawn.append(f'<text class="left" x="{x + 17}" y="91">{name}</text>')
    if held.activations:
        by_loop, at_once = picture.seconds
        time = f" Time: {by_loop / at_once:.1f} × the time of one batch." if by_loop and at_once else ""
        text = (
            f"Activations: <b data-number=activations>{_bytes(held.activations)}</b> in micro-batches, "
            f"<b data-number=at-once>{_bytes(held.activations_at_once)}</b> as one batch "
            f"({held.activations / held.activations_at_once:.2f} ×).{time}"
        )
    else:
        text = "Measured during training."
    return _figure("Memory", text, f"0 0 {WIDTH_UNITS:.0f} 98", drawn)


def losses(picture: Picture) -> str:
    """Draw the loss of each window, one line for each loop."""
    left, right, top, bottom = 44.0, WIDTH_UNITS - 6, 8.0, 132.0
    known = [v for values in picture.losses.values() for v in values if math.isfinite(v)]
    first = picture.losses["at once"][0] if picture.losses["at once"] else 1.0
    most = min(max(known, default=1.0), 1.6 * first if math.isfinite(first) else math.inf) or 1.0
    least = min(0.9 * min(known, default=0.0), most * 0.9)
    windows = max(20, *map(len, picture.losses.values()))

    def at(number: int, value: float) -> str:
        x = left + (right - left) * number / (windows - 1)
        share = (min(value, most) - least) / ((most - least) or 1)
        return f"{x:.1f},{bottom - (bottom - top) * share:.1f}"

    drawn = [f'<path class="axis" d="M{left} {top} V{bottom} H{right}"/>']
    for value in (least, (least + most) / 2, most) if known else ():
        y = at(0, value).partition(",")[2]
        drawn.append(f'<text class="at" x="{left - 5}" y="{float(y) + 4:.1f}">{_tick(value, most)}</text>')
    for number in (0, windows - 1):
        x = at(number, least).partition(",")[0]
        place = "left" if number == 0 else "at"
        drawn.append(f'<text class="{place}" x="{x}" y="{bottom + 15}">window {number + 1}</text>')
    for number in picture.changes:
        x = at(number, least).partition(",")[0]
        drawn.append(f'<line class="change" x1="{x}" x2="{x}" y1="{top}" y2="{bottom}"/>')
        drawn.append(f'<text class="left faint" x="{x}" y="{top + 8}">changed</text>')
    said = []
    for who, (name, kind, dashes) in LINES.items():
        if who not in picture.losses:
            continue
        kind = _kind(picture) if who == "shown" else kind
        values = picture.losses[who]
        finite = values[: next((i for i, v in enumerate(values) if not math.isfinite(v)), len(values))]
        points = " ".join(at(i, v) for i, v in enumerate(finite))
        drawn.append(f'<polyline class="{kind}" stroke-dasharray="{dashes}" points="{points}"/>')
        if finite:
            x, y = points.split()[-1].split(",")
            drawn.append(f'<circle class="{kind}" cx="{x}" cy="{y}" r="{5 if who == "at once" else 3}"/>')
        if len(finite) < len(values):
            x, y = at(max(0, len(finite) - 1), most).split(",")
            drawn.append(f'<text class="left bad" x="{x}" y="{float(y) + 12:.1f}">✗ diverged</text>')
        key = who.replace(" ", "-")
        last = _loss(values[-1]) if values else "–"
        swatch = (
            f'<svg class="swatch" viewBox="0 0 30 8"><polyline class="{kind}" stroke-dasharray="{dashes}"'
        )
        said.append(f'{swatch} points="0,4 30,4"/></svg> {name} <b data-number="loss-{key}">{last}</b>')
    text = ", ".join(said) + f". Learning rate: <b data-number=lr>{picture.lr:.4g}</b>."
    return _figure("The loss of each window", text, f"0 0 {WIDTH_UNITS:.0f} 152", drawn)


def doctor(picture: Picture) -> str:
    """Return the verdict of the doctor, in a sentence."""
    sign, kind = ("✓", "right") if picture.is_healthy else ("✗", "bad")
    said = escape(picture.doctor[0].upper() + picture.doctor[1:])
    who = f"The doctor's verdict after {DIAGNOSED_WINDOWS} windows of this loop"
    return f'<p class="doctor"><b class="{kind}">{sign}</b> {who}: {said}.</p>'


def _kind(picture: Picture) -> str:
    """Return the style class of the shown loop: gradacc's loop, or a loop with a fault."""
    return "ours" if picture.settings.fault == "none" else "shown"


def _figure(title: str, text: str, box: str, drawn: Sequence[str]) -> str:
    svg = f'<svg viewBox="{box}" role="img" aria-label="{title}">{"".join(drawn)}</svg>'
    return f"<figure><figcaption>{title}</figcaption>{svg}<p>{text}</p></figure>"


def _padding(cells: Sequence[MicroBatchShape]) -> float:
    padded = sum(cell.padded_to * len(cell.tokens) for cell in cells)
    return 1 - sum(sum(cell.tokens) for cell in cells) / padded


def _tick(value: float, most: float) -> str:
    """Return the label of an axis, short enough for its margin."""
    return "0" if abs(value) < most / 1000 else f"{value:.2g}"


def _error(value: float) -> str:
    if math.isnan(value):
        return "–"
    return f"{value:.1e}" if 0 < value < 0.001 else f"{value:.3f}"


def _number(value: float) -> str:
    return f"{value:.4g}"


def _loss(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1e4 else f"{value:.3g}"


def _bytes(value: float) -> str:
    return f"{value:,.0f} B" if value < 1e4 else f"{value / 1e6:,.1f} MB"
