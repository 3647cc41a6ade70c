"""The argument parser of all commands, and the context manager that reports gradacc's exceptions."""

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from gradacc_hf.errors import GradaccError, InputError, one_line
from gradacc_hf.utils.redaction import without_tokens


class Parser(argparse.ArgumentParser):
    """An argument parser that raises InputError where argparse prints its usage and exits."""

    def error(self, message: str) -> NoReturn:
        """Raise InputError with the message and the command that prints the usage."""
        raise InputError(f"{message} (see {self.prog} --help)")


@contextmanager
def command() -> Iterator[None]:
    """Run the block as a command.

    A GradaccError ends the command with one line on stderr and the exit code of the exception. Only the main
    process prints the line, without access tokens, unless the exception has `every_process_reports`. Other
    users cannot write the files that the command creates.
    """
    umask = os.umask(0o002)
    os.umask(umask | 0o002)
    try:
        yield
    except GradaccError as error:
        if int(os.environ.get("RANK", 0)) == 0 or error.every_process_reports:
            print(f"error: {without_tokens(one_line(error))}", file=sys.stderr)
        sys.exit(error.exit_code)
    finally:
        os.umask(umask)
