"""The exceptions of gradacc, and helpers for their messages.

    GradaccError                            base class; exit code 1
    ├── InputError (ValueError)             a setting, an argument or a file is wrong; exit code 2
    ├── MissingExtraError (ImportError)     a package of an extra is not installed; exit code 2
    ├── LoopError (RuntimeError)            a copied loop leaves out a call that it needs
    ├── NonFiniteError                      the loss or gradient of a window is not finite
    ├── OutOfMemoryError (RuntimeError)     no split of the window fits in memory
    │   ├── OutOfMemoryWhileSyncingError    other processes already wait for the gradients
    │   └── PeerOutOfMemoryError            another process is out of memory; handled by `retry_on_oom`
    ├── PaddingNotRemovableError            a model cannot compute its layers without padding
    ├── LogitsNeededError                   a loss reads logits at positions without labels
    ├── NotTraceableError                   memory cannot be predicted for this model
    ├── HeadUnavailableError                a tiny model of this head cannot be built offline
    ├── ReplayError                         the doctor cannot recompute a window
    ├── WorkerGoneError                     the training process of a browser session has ended
    └── VariantFailedError                  a measured process of `gradacc bench` has failed

Every message is one line: what was found, what is allowed, what to change. A command prints the line and
exits with the code of the exception.
"""

from typing import Any, ClassVar, NoReturn


class GradaccError(Exception):
    """Base class of all exceptions that gradacc raises on purpose."""

    exit_code: ClassVar[int] = 1
    """Exit code of a command that ends with this exception."""
    every_process_reports: ClassVar[bool] = False
    """Whether any process prints the message, not only the main process."""


class InputError(GradaccError, ValueError):
    """A setting, an argument or a file of the user is wrong."""

    exit_code = 2


class LoopError(GradaccError, RuntimeError):
    """A training loop omits a call that a window needs, or makes it in the wrong place."""


class NonFiniteError(GradaccError):
    """The loss or gradient of a window is not finite, and no step was taken."""


class OutOfMemoryError(GradaccError, RuntimeError):
    """Memory ran out, and no split of the window into micro-batches can prevent it."""


class OutOfMemoryWhileSyncingError(OutOfMemoryError):
    """Memory ran out while other processes wait for the gradients of this one.

    The run must resume from its last checkpoint, with micro-batches of at most `max_tokens` padded tokens.
    """

    every_process_reports = True

    def __init__(self, message: str, max_tokens: int):
        super().__init__(message, max_tokens)
        self.max_tokens = max_tokens

    def __str__(self) -> str:
        return self.args[0]


class PaddingNotRemovableError(GradaccError):
    """A model does not compute the same loss and gradients without padding."""


class LogitsNeededError(GradaccError):
    """The loss of a model reads logits at positions without labels, or cannot be tested."""


class NotTraceableError(GradaccError):
    """A training step of this model cannot be traced, so its memory cannot be predicted."""


class HeadUnavailableError(GradaccError):
    """A tiny model of this head cannot be built offline."""


class MissingExtraError(GradaccError, ImportError):
    """A package of an extra of gradacc-hf is not installed.

    The message names the feature, the missing packages, and the `pip install` command.
    """

    exit_code = 2


def one_line(error: BaseException) -> str:
    """Return the message of an exception without line breaks."""
    return " ".join(str(error).split())


def listed(names: Any) -> str:
    """Return names as a comma-separated list, for a message."""
    return ", ".join(map(str, names))


def refuse(key: str, found: str, allowed: str) -> NoReturn:
    """Raise InputError with the setting, what was found, and what is allowed or what to change."""
    raise InputError(f"{key}: {found}; {allowed}") from None


def __getattr__(name: str) -> Any:
    """Return `InputError` under its old name `BadInput` (version 0.1.0), with a DeprecationWarning."""
    if name != "BadInput":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import warnings

    warnings.warn("gradacc_hf.errors.BadInput is now gradacc_hf.InputError", DeprecationWarning, stacklevel=2)
    return InputError
