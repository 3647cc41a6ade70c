"""`gradacc bench play`: the speed of the page of `gradacc play`, in a browser."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from statistics import median
from typing import Any

from rich.console import Console

from gradacc_hf.bench.progress import Progress
from gradacc_hf.errors import InputError
from gradacc_hf.training.run_log import measured_with

COUNTED_SECONDS = 4.0  # duration of counting updates of the page
COUNT_UPDATES = """seconds => new Promise(done => {
let n = 0;
const seen = new MutationObserver(() => n++);
seen.observe(document.querySelector("#see-window"), {childList: true, subtree: true, characterData: true});
setTimeout(() => done(n / seconds), 1000 * seconds);
})"""


@dataclass(frozen=True)
class PageResult:
    """Latency of the page for each visitor, and updates per second by the number of visitors."""

    first_picture: tuple[float, ...]  # seconds from opening the page to the first picture
    first_answer: tuple[float, ...]  # seconds from opening the page to the response to a click
    updates: dict[str, tuple[float, ...]]  # per second
    measured_with: dict[str, str]


def measure_page(repeats: int, progress: Progress = iter) -> PageResult:
    """Open the page in a browser; play it in one tab, then in two. Raises InputError without a browser."""
    if find_spec("playwright") is None or find_spec("gradio") is None:
        raise InputError("bench play needs Gradio and Playwright: pip install gradio playwright")
    from playwright.sync_api import Error, sync_playwright

    first: list[float] = []
    answers: list[float] = []
    updates: dict[str, list[float]] = {"one": [], "each of two": []}
    with served() as (address, _), sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        except Error as error:
            raise InputError(f"bench play needs Chromium: {str(error).splitlines()[0]}") from None

        def open_page() -> Any:
            page, begun = browser.new_context().new_page(), time.perf_counter()
            page.goto(address)
            page.wait_for_selector("#see-code .line")
            first.append(time.perf_counter() - begun)
            page.click("#micro-batch")
            page.wait_for_selector("[data-number=done]:text-is('1')")
            answers.append(time.perf_counter() - begun)
            return page

        for _ in progress(range(repeats)):
            one, other = open_page(), open_page()
            one.click("#play")
            updates["one"].append(one.evaluate(COUNT_UPDATES, COUNTED_SECONDS))
            other.click("#play")
            updates["each of two"] += [
                one.evaluate(COUNT_UPDATES, COUNTED_SECONDS),
                other.evaluate(COUNT_UPDATES, COUNTED_SECONDS),
            ]
            one.context.close()
            other.context.close()
        browser.close()
    found = {who: tuple(counts) for who, counts in updates.items()}
    return PageResult(tuple(first), tuple(answers), found, measured_with("cpu"))


def chromium() -> str | None:
    """Return the path of an installed Chromium, or None to use Playwright's Chromium."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((found for name in names if (found := shutil.which(name))), None)


PLAY = (sys.executable, "-m", "gradacc_hf", "play", "--no-browser")


@contextmanager
def served(command: Sequence[str] = PLAY, **how: Any) -> Iterator[tuple[str, subprocess.Popen]]:
    """Serve the page from a separate process, and yield the address and the process.

    The port is set with an environment variable, as in a Space. `how`: arguments of subprocess.Popen.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**how.pop("env", os.environ), "GRADIO_SERVER_PORT": str(port)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, **how)
    address = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(address, timeout=5).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > until:
                    raise InputError("bench play: the page did not start; try `gradacc play`") from None
                time.sleep(0.2)
        yield address, process
    finally:
        process.terminate()
        process.wait()


def print_page(result: PageResult, console: Console) -> None:
    """Print medians and extremes."""
    for what, seconds in (("picture", result.first_picture), ("response to a click", result.first_answer)):
        middle, most = median(seconds), max(seconds)
        console.print(
            f"first {what} after opening the page: median {middle:.2f} s, at most {most:.2f} s "
            f"({len(seconds)} times)"
        )
    for who, counts in result.updates.items():
        middle, least = median(counts), min(counts)
        console.print(f"updates per second, {who} playing: median {middle:.1f}, at least {least:.1f}")
