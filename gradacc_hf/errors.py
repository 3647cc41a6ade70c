"""The one error that is the user's to correct, how it is worded, and how a command ends by it."""

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from gradacc_hf.redact import without_tokens


class BadInput(ValueError):
    """Something the user gave is wrong.

    Its message is one line: what was found, what is allowed, what to change. The command line prints it and
    exits with 2.
    """

    of_one_process = False  # which says it then, whichever it is


class MissingExtraError(ImportError):
    """A package is missing that an extra of this one installs.

    Its message is one line: what needs which packages, and the `pip install` that brings them.
    """


class Parser(argparse.ArgumentParser):
    """A parser of commands that are no recipe's: what it cannot read is a BadInput."""

    def error(self, message: str) -> NoReturn:
        """Raise BadInput, where argparse would print its usage and leave."""
        raise BadInput(f"{message} ({self.prog} --help says what there is)")


@contextmanager
def command() -> Iterator[None]:
    """Around all that a command does: a BadInput ends it, no file that it leaves is everybody's to write.

    The line of a BadInput or a MissingExtraError goes to stderr, of the main process alone and without
    tokens; the exit code is 2.
    """
    umask = os.umask(0o002)
    os.umask(umask | 0o002)
    try:
        yield
    except (BadInput, MissingExtraError) as error:
        if int(os.environ.get("RANK", 0)) == 0 or getattr(error, "of_one_process", False):
            print(f"error: {without_tokens(one_line(error))}", file=sys.stderr)
        sys.exit(2)
    finally:
        os.umask(umask)


def one_line(error: BaseException) -> str:
    """The message of an error, without line breaks."""
    return " ".join(str(error).split())


def listed(names: Any) -> str:
    """Names, for a message."""
    return ", ".join(map(str, names))


def refuse(key: str, found: str, allowed: str) -> NoReturn:
    """Raise BadInput: the setting, what was found, what is allowed or what to do."""
    raise BadInput(f"{key}: {found}; {allowed}") from None
