"""Draw a run as an animated SVG for a README: the pictures of the page in sequence, without a script."""

import re
from html import escape
from itertools import accumulate, groupby
from pathlib import Path

from rich.console import Console
from rich.progress import track

from gradacc_hf.errors import InputError
from gradacc_hf.play import drawing as pictures
from gradacc_hf.play.session import Picture, Session
from gradacc_hf.play.settings import PlaySettings
from gradacc_hf.utils.files import write_whole

SLOW_WINDOWS, FAST_WINDOWS = 2, 24  # first windows shown line by line, then windows of one picture each
PICTURE_SECONDS = {"slow": 0.6, "fast": 0.18}  # for one picture
WIDTH, HEIGHT = 940, 470
PLACES = {  # x, y, width and title of each picture
    "window": (560, 40, 350, "The window"),
    "bucket": (20, 278, 400, "The gradient"),
    "losses": (500, 278, 410, "The loss of each window"),
}
CSS_RULES = (  # the rules of page.css that the SVG needs
    *(":root", "svg text", "polyline", ".axis", ".ground", ".hatch", ".frame", ".tokens", ".coming"),
    *(".fill", ".bucket", ".target", ".mark", "circle"),
)


def write_film(path: Path) -> Path:
    """Run gradacc's loop for 26 windows and write the animation.

    Raises:
        InputError: if the path is not a new .svg file in an existing folder.
    """
    if path.suffix != ".svg" or not path.parent.is_dir():
        raise InputError(f"--film: found {path}; allowed: a file that ends in .svg, in an existing folder")
    if path.exists():
        raise InputError(f"--film: {path} exists and is not overwritten; give another name")
    session, seen, seconds = Session(PlaySettings()), [], []
    while session.picture().window < SLOW_WINDOWS:
        session.advance("line")
        picture = session.picture()
        if picture.stop in ("forward", "backward") or picture.done == len(picture.cells):
            seen.append(picture)
            seconds.append(PICTURE_SECONDS["slow"])
    for _ in track(range(FAST_WINDOWS), "windows", console=Console(stderr=True), transient=True):
        session.advance("window")
        seen.append(session.picture())
        seconds.append(PICTURE_SECONDS["fast"])
    write_whole(path, film(seen, [*seconds[:-1], 3 * PICTURE_SECONDS["slow"]]))
    return path


def film(seen: list[Picture], seconds: list[float]) -> str:
    """Return the pictures as an SVG that repeats.

    A browser that reduces motion shows only the last picture.

    Args:
        seen: the pictures, in order.
        seconds: the duration of each picture.
    """
    ends = [100 * end / sum(seconds) for end in accumulate(seconds)]
    layers = [[_code(picture) for picture in seen]]
    layers += [[_placed(name, getattr(pictures, name)(picture)) for picture in seen] for name in PLACES]
    parts, styles = [], []
    for layer in layers:
        last = -1
        for drawn, same in groupby(layer):
            first, last = last + 1, last + len(list(same))
            number, stays = len(parts), last == len(seen) - 1
            hidden = f"0% {{visibility: hidden}} {ends[first - 1]:.2f}%" if first else "0%"
            over = "" if stays else f" {ends[last]:.2f}% {{visibility: hidden}}"
            styles.append(f"@keyframes k{number} {{{hidden} {{visibility: visible}}{over}}}")
            styles.append(f".k{number} {{animation-name: k{number}}}")
            parts.append(f'<g class="shot{" last" * stays} k{number}">{drawn}</g>')
    moving = (
        f".shot {{visibility: hidden; animation-duration: {sum(seconds):.1f}s; "
        "animation-iteration-count: infinite; animation-timing-function: step-end} "
        "@media (prefers-reduced-motion: reduce) "
        "{.shot {animation: none} .shot.last {visibility: visible}} "
        "text {font-family: sans-serif} .mono {font-family: monospace; font-size: 12px}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">'
        "<title>gradacc's loop trains a small transformer, micro-batch by micro-batch</title>"
        f"<style>:root {{--body-text-color: #1c1c1c}} {_rules()} {moving} {' '.join(styles)}</style>"
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="10" fill="#ffffff"/>'
        f"<defs>{pictures.HATCHED.format('padding', 'ground')}</defs>{''.join(parts)}</svg>\n"
    )


def _rules() -> str:
    """Return the style rules of the page that the SVG needs, in light mode."""
    css = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
    css = re.sub(r"/\*.*?\*/", "", css, flags=re.DOTALL)
    rules = [rule.strip() for rule in re.findall(r"[^{}]+\{[^{}]*\}", css)]
    return " ".join(rule for rule in rules if rule.startswith(CSS_RULES))


def _code(picture: Picture) -> str:
    lines = []
    for number, text in enumerate(picture.code):
        y = 40 + 20 * number
        code = text.partition("  #")[0]
        indent = len(code) - len(code.lstrip())
        if number == picture.line:
            lines.append(f'<rect x="10" y="{y - 14}" width="530" height="20" fill="#fff1c9"/>')
            lines.append(f'<text class="left mono" x="14" y="{y}">▶</text>')
        lines.append(f'<text class="left mono" x="{32 + 6 * indent}" y="{y}">{escape(code.strip())}</text>')
    return "".join(lines)


def _placed(name: str, figure: str) -> str:
    """Return a picture at its place, with its title and the first sentence of its text."""
    x, y, width, title = PLACES[name]
    drawn = re.search(r'<svg viewBox="0 0 ([^"]*)"[^>]*>(.*?)</svg>', figure, re.DOTALL)
    assert drawn is not None
    wide, high = map(float, drawn[1].split())
    height = width * high / wide
    inner = re.sub(r"<pattern.*?</pattern>", "", drawn[2])  # the animation defines the pattern once
    words = re.sub(r"<[^>]+>", "", figure.partition("</svg><p>")[2]).partition(". ")[0].removesuffix(".")
    said = "" if name == "losses" else f'<text class="left" x="{x}" y="{y + height + 18:.0f}">{words}</text>'
    return (
        f'<text class="left" x="{x}" y="{y - 10}" font-weight="700">{title}</text>'
        f'<svg x="{x}" y="{y}" width="{width}" height="{height:.0f}" viewBox="0 0 {drawn[1]}">{inner}</svg>'
        f"{said}"
    )
