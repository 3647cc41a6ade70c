"""The argument parser of all commands, and the context manager that reports gradacc's exceptions."""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NoReturn

from gradacc_hf.errors import GradaccError, InputError, one_line
from gradacc_hf.utils.redaction import without_tokens


class Parser(argparse.ArgumentParser):
    """An argument parser that raises InputError where argparse prints its usage and exits."""

    def parse_known_args(self, *args: Any, **kwargs: Any) -> Any:
        """Parse the arguments, unless `parser_of` needs the parser alone."""
        if _only_the_parser.get():
            raise _ParserReached(self)
        return super().parse_known_args(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Raise InputError with the message and the command that prints the usage."""
        raise InputError(f"{message} (see {self.prog} --help)")


class _ParserReached(BaseException):
    """Carries the parser of a command that would parse its arguments now."""

    def __init__(self, parser: Parser):
        super().__init__()
        self.parser = parser


_only_the_parser: ContextVar[bool] = ContextVar("only_the_parser", default=False)


def parser_of(main: Callable[[Sequence[str]], Any]) -> Parser:
    """Return the parser of a command. Its `main` runs until it parses the arguments, and no further."""
    token = _only_the_parser.set(True)
    try:
        main([])
    except _ParserReached as reached:
        return reached.parser
    finally:
        _only_the_parser.reset(token)
    raise TypeError(f"{main.__module__}.main parses no arguments")


@contextmanager
def command() -> Iterator[None]:
    """Run the block as a command.

    A GradaccError ends the command with one line on stderr and the exit code of the exception. Only the main
    process prints the line, without access tokens, unless the exception has `every_process_reports`. Ctrl-C
    ends it with one line and exit code 130. Other users cannot write the files that the command creates.
    """
    umask = os.umask(0o002)
    os.umask(umask | 0o002)
    try:
        yield
    except GradaccError as error:
        if int(os.environ.get("RANK", 0)) == 0 or error.every_process_reports:
            print(f"error: {without_tokens(one_line(error))}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        if int(os.environ.get("RANK", 0)) == 0:
            print("SIGINT: stopped at once", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    finally:
        os.umask(umask)
