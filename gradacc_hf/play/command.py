"""`gradacc play`: the command line."""

import os
import socket
from collections.abc import Sequence
from pathlib import Path

from gradacc_hf.errors import InputError, one_line
from gradacc_hf.utils.commands import Parser
from gradacc_hf.utils.extras import require

MAX_SESSIONS = 8  # browser sessions at the same time; each has a process


def main(argv: Sequence[str]) -> None:
    """Open the page, write the page as a Space, or write an animation.

    Raises:
        InputError: if an argument is not allowed or a file, a folder or an address cannot be used.
    """
    parser = Parser(
        prog="gradacc play",
        description="Open a page that shows gradacc's loop while it trains a small model.",
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to serve at (default: %(default)s, this machine only)"
    )
    parser.add_argument("--port", type=int, help="port to serve at (default: the first free port from 7860)")
    parser.add_argument("--no-browser", action="store_true", help="print the address and open no browser")
    parser.add_argument(
        "--space",
        type=Path,
        metavar="FOLDER",
        help="write the page as a Space for the Hub into a new folder, and exit",
    )
    parser.add_argument(
        "--film",
        type=Path,
        metavar="FILE.svg",
        help="write an animation of the first windows of a run, and exit",
    )
    given = parser.parse_args(argv)
    if given.port is not None and not 1 <= given.port <= 65535:
        raise InputError(f"--port: found {given.port}; allowed: 1 to 65535")
    require("gradacc play", "play", *(["datasets", "pyarrow"] if given.film else []))
    try:
        if given.film is not None:
            from gradacc_hf.play.animation import write_film

            print(write_film(given.film))
        elif given.space is not None:
            from gradacc_hf.play.space import write_space

            print(write_space(given.space))
        else:
            _check_address(given.host, given.port)
            serve(given.host, given.port, opens_browser=not given.no_browser)
    except OSError as error:
        raise InputError(
            f"gradacc play: {one_line(error)}; give another file, folder, host or port"
        ) from None


def _check_address(host: str, port: int | None) -> None:
    """Raise InputError if the address cannot be used. Gradio itself would try one port after another."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind((host, port or 0))
    except OSError as error:
        raise InputError(
            f"--host, --port: cannot serve at {host}, port {port or 'any'}: {one_line(error)}; "
            "give another host or port"
        ) from None


def serve(host: str | None = None, port: int | None = None, opens_browser: bool = False) -> None:
    """Serve the page until Ctrl-C.

    Args:
        host: address; None for Gradio's default, which a Space sets in the environment.
        port: None for the first free port.
        opens_browser: whether to open a browser.
    """
    from gradacc_hf.play.workers import Workers, start_server

    start_server()  # runs while this process imports the page
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    from gradacc_hf.play.page import LAUNCH, build
    from gradacc_hf.play.sessions import BrowserSessions

    workers = Workers(MAX_SESSIONS)
    try:
        page = build(BrowserSessions(workers), workers.first_picture())
        _, address, _ = page.launch(
            server_name=host, server_port=port, inbrowser=opens_browser, prevent_thread_lock=True, **LAUNCH
        )
        print(f"{address} (stop with Ctrl-C)", flush=True)
        page.block_thread()
    finally:
        workers.end()
