"""The page: controls, pictures and the tour, with Gradio. `sessions.py` defines the actions."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any, get_args

import gradio as gr
from starlette.middleware import Middleware
from starlette.responses import Response

from gradacc_hf.accumulation.batch_schedule import LrScaling
from gradacc_hf.errors import InputError
from gradacc_hf.play import drawing as pictures
from gradacc_hf.play import tour
from gradacc_hf.play.session import Picture
from gradacc_hf.play.sessions import SPEEDS, BrowserSessions, PageUpdate
from gradacc_hf.play.settings import Fault, Lengths, ModelName, PlaySettings, Precision, fitting, steps_of

HERE = Path(__file__).parent
DRAWN: dict[str, Callable[[Picture], str]] = {
    name: getattr(pictures, name) for name in ("doctor", "code", "window", "bucket", "memory", "losses")
}
CONTROLS = (
    *("model", "micro_batch", "steps", "effective", "fault", "lengths"),
    *("lr", "max_grad_norm", "seed", "lr_scaling", "precision"),
)
FOLLOWING = ("micro_batch", "steps", "effective", "lr")  # other controls may set these
WHOLE = ("micro_batch", "steps", "effective", "seed")  # integers, which Gradio passes as 4.0
BUTTONS = {
    "play": "▶ Play",
    "pause": "Pause",
    "line": "One line",
    "micro-batch": "One micro-batch",
    "window": "One window",
    "restart": "Restart",
}
KEYS = "<p class=keys>Keys: <kbd>p</kbd> play or pause, <kbd>l</kbd> one line, <kbd>m</kbd> one micro-batch, \
<kbd>w</kbd> one window, <kbd>r</kbd> restart.</p>"
TITLE = """<h1>Gradient accumulation, while it happens</h1>
<p>The loop below trains a small model. Every number is measured during this training.
A <b>window</b> holds the examples of one optimizer step.
A <b>micro-batch</b> is the part of a window that one forward and backward pass processes.</p>
<p>Press <b>Play</b>, or run one line, one micro-batch or one window.
Change any setting to see the effect.</p>"""
# System fonts only: the page loads nothing from other hosts.
THEME: Any = gr.themes.Default(  # type: ignore[attr-defined]
    font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
)


class NoUploads:
    """Middleware that refuses uploads. Gradio apps accept files by default; this page uses no files."""

    def __init__(self, app: Any):
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request. The answer to an upload is 404."""
        is_upload = scope["type"] == "http" and "/upload" in scope["path"]
        await (Response(status_code=404) if is_upload else self._app)(scope, receive, send)


LAUNCH: dict[str, Any] = {
    "theme": THEME,
    "css_paths": HERE / "page.css",
    "head": f"<script>{(HERE / 'page.js').read_text(encoding='utf-8')}</script>",
    "footer_links": [],
    "share": False,
    "ssr_mode": False,
    "mcp_server": False,
    "run_history": False,
    "quiet": True,
    "app_kwargs": {"middleware": [Middleware(NoUploads)]},
}


def build(sessions: BrowserSessions, first: Picture) -> gr.Blocks:
    """Return the page.

    Args:
        sessions: the actions of the buttons and controls.
        first: the picture to show before a session begins.
    """
    with gr.Blocks(
        title="Gradient accumulation, while it happens", analytics_enabled=False, fill_width=True
    ) as blocks:
        gr.HTML(TITLE, elem_id="title")
        with gr.Accordion("Guided tour", elem_id="tour"):
            at = gr.State(-1)
            text = gr.HTML(tour.page_of(-1), elem_id="tour-text")
            with gr.Row():
                back = gr.Button("Back", elem_id="tour-back", size="sm", min_width=80)
                forth = gr.Button("Next", elem_id="tour-next", size="sm", variant="primary", min_width=80)
        with gr.Row():
            with gr.Column(scale=1, min_width=320, elem_id="controls"):
                speed = gr.Radio(list(SPEEDS), value="micro-batches", label="Play by", elem_id="speed")
                controls = _controls(first.settings)
            with gr.Column(scale=3, min_width=330, elem_id="stage"):
                with gr.Row(elem_id="buttons"):
                    buttons = {
                        name: gr.Button(
                            said,
                            elem_id=name,
                            min_width=90,
                            size="sm",
                            variant="primary" if name == "play" else "secondary",
                        )
                        for name, said in BUTTONS.items()
                    }
                message = gr.HTML("", elem_id="message")
                with gr.Column(elem_id="pictures"):
                    shown = {
                        name: gr.HTML(draw(first), elem_id=f"see-{name}") for name, draw in DRAWN.items()
                    }
                gr.HTML(KEYS)

        seen = [message, *shown.values()]
        named = [controls[name] for name in CONTROLS]

        def on(
            event: Any, what: Callable[..., Any], inputs: Any = None, outputs: Any = seen, **more: Any
        ) -> None:
            more = {"show_progress": "hidden", "concurrency_limit": None, "api_visibility": "private", **more}
            event(what, inputs, outputs, **more)

        on(blocks.load, drawing(sessions.enter))
        on(buttons["play"].click, drawing_on(sessions.play), trigger_mode="multiple")
        on(buttons["pause"].click, drawing(sessions.pause))
        on(buttons["restart"].click, restarted(sessions), named)
        for to in ("line", "micro-batch", "window"):
            # In sequence, so that the picture of an earlier click does not arrive last.
            on(buttons[to].click, drawing(sessions.go_on, to), trigger_mode="always_last")
        on(speed.input, paced(sessions), speed)
        for name, control in controls.items():
            following = [controls[other] for other in FOLLOWING]
            on(control.input, changed(sessions, name), named, [*following, *seen], trigger_mode="always_last")
        for button, by in ((back, -1), (forth, 1)):
            on(button.click, toured(sessions, by), at, [at, text, *named, *seen])
        blocks.unload(closed(sessions))
    return blocks


def _controls(settings: PlaySettings) -> dict[str, Any]:
    def number(name: str, label: str) -> Any:
        return gr.Number(getattr(settings, name), label=label, elem_id=name, min_width=90)

    def choice(name: str, kind: Any, label: str) -> Any:
        value, among = getattr(settings, name), list(get_args(kind))
        return gr.Radio(among, value=value, label=label, elem_id=name)

    controls = {"model": choice("model", ModelName, "Model")}
    with gr.Row():
        controls["micro_batch"] = number("micro_batch", "Micro-batch size")
        controls["steps"] = number("steps", "Accumulation steps")
        controls["effective"] = number("effective", "Effective batch size")
    controls["fault"] = choice("fault", Fault, "Mistake in the loop")
    controls["lengths"] = choice("lengths", Lengths, "Lengths of the examples")
    with gr.Row():
        controls["lr"] = number("lr", "Learning rate")
        controls["max_grad_norm"] = number("max_grad_norm", "Clip at norm (0: off)")
        controls["seed"] = number("seed", "Seed")
    controls["lr_scaling"] = choice("lr_scaling", LrScaling, "Scale the learning rate by batch size / 16")
    controls["precision"] = choice("precision", Precision, "Precision")
    return controls


# An event of the page becomes a request to sessions.py. The answer is drawn.


def drawing(what: Callable[..., PageUpdate], *given: Any) -> Callable[[gr.Request], list[Any]]:
    """Return a handler that passes a click on and draws the answer."""

    def clicked(request: gr.Request) -> list[Any]:
        return _drawn(what(_name(request), *given))

    return clicked


def drawing_on(what: Callable[[str], Iterator[PageUpdate]]) -> Callable[[gr.Request], Iterator[list[Any]]]:
    """Return a handler that passes a click on and draws a sequence of answers."""

    def clicked(request: gr.Request) -> Iterator[list[Any]]:
        before: list[Any] = []
        for seen in what(_name(request)):
            drawn = _drawn(seen)
            pairs = zip(drawn, before or [None] * len(drawn), strict=True)
            yield [gr.skip() if new == old else new for new, old in pairs]
            before = drawn

    return clicked


def paced(sessions: BrowserSessions) -> Callable[[str, gr.Request], list[Any]]:
    """Return the handler for a change of the speed."""

    def chosen(speed: str, request: gr.Request) -> list[Any]:
        return _drawn(sessions.set_speed(_name(request), speed))

    return chosen


def restarted(sessions: BrowserSessions) -> Callable[..., list[Any]]:
    """Return the handler of the restart button, which begins a run with the values of the controls."""

    def clicked(request: gr.Request, *values: Any) -> list[Any]:
        try:
            settings = _settings(_read(values))
        except InputError as error:
            return _drawn(sessions.refuse(_name(request), str(error)))
        return _drawn(sessions.restart(_name(request), settings))

    return clicked


def closed(sessions: BrowserSessions) -> Callable[[gr.Request], None]:
    """Return the handler for the closing of the page."""

    def left(request: gr.Request) -> None:
        sessions.leave(_name(request))

    return left


def changed(sessions: BrowserSessions, which: str) -> Callable[..., list[Any]]:
    """Return the handler for a change of a control.

    Two of micro-batch size, accumulation steps and effective batch size determine the third. A change of the
    model also sets sizes and a learning rate that suit the new model.
    """

    def take(request: gr.Request, *values: Any) -> list[Any]:
        unchanged = [gr.skip()] * len(FOLLOWING)
        try:
            before = given = _read(values)
            if which == "model":
                given = given | fitting(given["model"])
            elif which == "effective":
                given = given | {"steps": steps_of(given["effective"], given["micro_batch"])}
            settings = _settings(given)
        except InputError as error:
            return [*unchanged, *_drawn(sessions.refuse(_name(request), str(error)))]
        now = asdict(settings) | {"effective": settings.effective}
        following = [gr.skip() if now[name] == before[name] else now[name] for name in FOLLOWING]
        return [*following, *_drawn(sessions.change(_name(request), settings))]

    return take


def toured(sessions: BrowserSessions, by: int) -> Callable[[int, gr.Request], list[Any]]:
    """Return the handler for a step of the tour, which shows a text and begins a run with its settings.

    Args:
        sessions: the actions of the page.
        by: 1 for the next step, -1 for the previous step.
    """

    def stepped(at: int, request: gr.Request) -> list[Any]:
        number = at + by
        if not -1 <= number < len(tour.STEPS):
            return [gr.skip()] * (2 + len(CONTROLS) + 1 + len(DRAWN))
        settings = tour.STEPS[number].settings if number >= 0 else PlaySettings()
        values = asdict(settings) | {"effective": settings.effective}
        seen = sessions.restart(_name(request), settings)
        return [number, tour.page_of(number), *(values[name] for name in CONTROLS), *_drawn(seen)]

    return stepped


def _read(values: Sequence[Any]) -> dict[str, Any]:
    """Return the values of the controls, with whole numbers as integers."""
    given = dict(zip(CONTROLS, values, strict=True))
    whole = (name for name in WHOLE if isinstance(given[name], float) and given[name].is_integer())
    return given | {name: int(given[name]) for name in whole}


def _settings(given: dict[str, Any]) -> PlaySettings:
    return PlaySettings(**{name: value for name, value in given.items() if name != "effective"})


def _name(request: gr.Request) -> str:
    """Return the name of the browser session. Raises gr.Error for a request without a session."""
    if not request.session_hash:
        raise gr.Error("The request has no session. Open the page in a browser.")
    return request.session_hash


def _drawn(seen: PageUpdate) -> list[Any]:
    kind = "bad" if seen.is_wrong else "note"
    ended = " data-ended" * seen.has_ended
    message = f'<p class="message {kind}"{ended}>{escape(seen.message)}</p>' if seen.message else ""
    if seen.picture is None:
        return [message, *[gr.skip()] * len(DRAWN)]
    return [message, *(draw(seen.picture) for draw in DRAWN.values())]
