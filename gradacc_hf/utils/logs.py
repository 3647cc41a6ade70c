"""Loggers for programs that may run as several processes."""

import logging
from collections.abc import MutableMapping
from typing import Any

from accelerate import PartialState
from accelerate.logging import MultiProcessAdapter


class RunLogger(MultiProcessAdapter):
    """Accelerate's logger, which prefixes lines with the process only if there are several."""

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        """Return the message of a record, and the options of the call that logs it."""
        if PartialState().num_processes > 1:
            return super().process(msg, kwargs)
        kwargs.setdefault("stacklevel", 2)
        return msg, kwargs


def get_logger(name: str) -> RunLogger:
    """Return the logger of this name. An Accelerator must exist before it is used."""
    return RunLogger(logging.getLogger(name), {})


def info(logger: Any, line: str) -> None:
    """Log a line at level INFO. It is shown even if the program does not configure logging."""
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
    handler = None if logger.hasHandlers() else logging.StreamHandler()
    if handler is not None:
        logger.addHandler(handler)
    logger.info(line)
    if handler is not None:  # a later `logging.basicConfig` adds another handler
        logger.removeHandler(handler)
