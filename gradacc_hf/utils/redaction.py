"""Hide secrets in the settings, commands and names of a run.

`redact` is for text that people read. It hides values whose key names a secret: a token, a password, an API
key. Fractional numbers under such keys stay. In any text it hides credentials in URLs, values of options and
variables that are named like secrets, and tokens with a well-known prefix. It may hide too much.

`without_tokens` is for files that gradacc reads again, and for messages. It hides only unmistakable secrets.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

HIDDEN = "[hidden]"

_NAME = (
    r"(?:[\w.-]*(?:secret|passw(?:or)?d|api[_-]?key|credential)[\w.-]*"
    r"|[\w.-]*(?:token|auth|authorization|access[_-]key|private[_-]key))"
)
_SECRET_KEY = re.compile(_NAME, re.IGNORECASE)
_VALUE = r"(?:\"[^\"]*\"|'[^']*'|[^\s&,;\"']+)"
_IN_URL = re.compile(r"(?<=://)[^\s/]*@"), f"{HIDDEN}@"
_IN_TEXT = (
    _IN_URL,
    (re.compile(r"\b(Bearer|Basic)\s+[\w.~+/=-]{8,}", re.IGNORECASE), rf"\1 {HIDDEN}"),
    (re.compile(rf"(?<![\w.-])(--{_NAME}\s+)(?!-){_VALUE}", re.IGNORECASE), rf"\1{HIDDEN}"),
    (re.compile(rf"(?<![\w.])({_NAME}[\"']?(?:=|:\s*))(?!//){_VALUE}", re.IGNORECASE), rf"\1{HIDDEN}"),
    (re.compile(r"hf_[A-Za-z0-9]{30,}|(?<!\w)hf_[A-Za-z0-9]{10,}"), HIDDEN),
    (re.compile(r"(?<!\w)(?:gh[opsu]_|github_pat_|glpat-|sk-)[\w-]{16,}"), HIDDEN),
)
_UNMISTAKABLE = (
    _IN_URL,
    (re.compile(rf"([?&]{_NAME}=)[^\s&#\"']+", re.IGNORECASE), rf"\1{HIDDEN}"),
    (re.compile(r"hf_[A-Za-z0-9]{30,}|(?<!\w)(?:gh[opsu]_|github_pat_|glpat-)[\w-]{20,}"), HIDDEN),
    (re.compile(r"(?<!\w)sk-(?:\w+-)?(?=\w*\d)(?=\w*[A-Z])\w{20,}"), HIDDEN),
)


def redact(value: Any) -> Any:
    """Return the same mapping, list or text without secrets."""
    if isinstance(value, dict):
        return {redact(key): _hidden(value[key]) if _is_secret(key) else redact(value[key]) for key in value}
    return _within(value, redact, _IN_TEXT)


def without_tokens(value: Any) -> Any:
    """Return the same mapping, list or text without credentials in URLs and tokens of well-known kinds."""
    if isinstance(value, dict):
        return {key: without_tokens(one) for key, one in value.items()}
    return _within(value, without_tokens, _UNMISTAKABLE)


def _within(value: Any, hide: Callable[[Any], Any], patterns: Sequence[tuple[re.Pattern[str], str]]) -> Any:
    if isinstance(value, list | tuple):
        return [hide(one) for one in value]
    if isinstance(value, str):
        for pattern, replacement in patterns:
            value = pattern.sub(replacement, value)
    return value


def _is_secret(key: Any) -> bool:
    return isinstance(key, str) and _SECRET_KEY.fullmatch(key) is not None


def _hidden(value: Any) -> Any:
    """Return what is shown for a value whose key names a secret.

    Empty values, booleans and fractional numbers stay, such as `loss_per_token: 2.3`.
    """
    return value if value in (None, "") or isinstance(value, bool | float) else HIDDEN
