"""The one error that is the user's to correct."""


class BadInput(ValueError):
    """Something the user gave is wrong.

    Its message is one line: what was found, what is allowed, what to change. The command line prints it and
    exits with 2.
    """
