"""The one error that is the user's to correct, and how it is worded."""

import argparse
from typing import Any, NoReturn


class BadInput(ValueError):
    """Something the user gave is wrong.

    Its message is one line: what was found, what is allowed, what to change. The command line prints it and
    exits with 2.
    """


class Parser(argparse.ArgumentParser):
    """A parser of commands that are no recipe's: what it cannot read is a BadInput."""

    def error(self, message: str) -> NoReturn:
        """Raise BadInput, where argparse would print its usage and leave."""
        raise BadInput(f"{message} ({self.prog} --help says what there is)")


def one_line(error: BaseException) -> str:
    """The message of an error, without line breaks."""
    return " ".join(str(error).split())


def listed(names: Any) -> str:
    """Names, for a message."""
    return ", ".join(map(str, names))


def refuse(key: str, found: str, allowed: str) -> NoReturn:
    """Raise BadInput: the setting, what was found, what is allowed or what to do."""
    raise BadInput(f"{key}: {found}; {allowed}") from None
