"""Data files: their kinds, and their text in any compression and encoding.

`tables.py` finds the separator of a table; `readers.py` reads the rows.
"""

import bz2
import codecs
import gzip
import lzma
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from io import TextIOWrapper
from pathlib import Path
from typing import IO, Any

from gradacc_hf.config.schema import SEPARATORS
from gradacc_hf.errors import listed, refuse

BUILDERS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".xlsx": "",  # read by pandas
}
"""Suffix of a data file → the builder of `datasets` that reads it."""
TABLES, JSONS = (".csv", ".tsv"), (".json", ".jsonl")
TEXTS = TABLES + JSONS
FAULT = "__fault"
"""Column with the reason why a row that was converted cannot be used, or null."""
TAGGED = (".conll", ".conllu", ".txt", ".tsv", ".iob", ".iob2", ".bio")
"""Suffixes of text files with a token and its tags on a line (`tagged_text.py`)."""
OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
COMPRESSED = (*OPENERS, ".zst")  # of text files
ALLOWED = f"{listed(BUILDERS)} (text also in {listed(COMPRESSED)})"
COLUMNS = "the name of each column"  # the place of the rows in a JSON object of columns
UTF8 = "utf-8-sig"  # skips a byte order mark

BLOCK = 1 << 20
_BEGINNINGS = {
    b"\x1f\x8b": ".gz",
    b"BZh91AY&SY": ".bz2",
    b"\xfd7zXZ\x00": ".xz",
    b"\x28\xb5\x2f\xfd": ".zst",
    b"PK\x03\x04": ".xlsx",
    b"PAR1\x15": ".parquet",
}
"""First bytes of files that are not text, and their suffix."""
_MARKS = (  # UTF-32 first: its mark begins with the mark of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_CYRILLIC = "абвгдежзийклмнопрстуфхцчшщъыьэюяёіїєґў"
_PAGES = {  # code page → letters that its languages use; of equal pages, the first is taken
    "cp1252": "àâäáãåæçèéêëìíîïñòóôõöøùúûüßœµ",
    "cp1250": "áâäăąćčçďéęëěíîĺľłńňóôöőŕřśšşťţúůüűýźżžß",
    "cp1254": "âçğıîöşûü",
    "cp1255": "אבגדהוזחטיךכלםמןנסעףפץצקרשת",
    "cp1251": _CYRILLIC,
    "koi8-r": _CYRILLIC,
    "cp1256": "ءآأؤإئابةتثجحخدذرزسشصضطظعغفقكلمنهوىي",
    "cp1253": "αβγδεζηθικλμνξοπρσςτυφχψωάέήίόύώ",
}
_LATIN = {"cp1252", "cp1250", "cp1254"}
_LAST = "ςךםןףץ"  # letters that only end a word
_SIGNS = "€„…‘’“”–—•™«»°§¿¡£©®½²±×·\xa0"
_WORD = re.compile(rb"[A-Za-z]*[\x80-\xff][A-Za-z\x80-\xff]*")


@dataclass(frozen=True)
class Form:
    """The form of a file, as found in it or as settings such as `data.separator` state. None: not known.

    separator: between the values of a table.
    encoding: of a text file, as Python names it.
    rows_key: the key of the rows in a JSON file of one object.
    sheet: of an Excel file.
    other_sheets: of the file, if no setting names the sheet.
    quotes: "as text" if the quotes of a table are part of its texts.
    without: columns of a Parquet file whose type `datasets` does not have.
    word_columns: the columns of tokens and of tags, by name or number, in a text file with a token on a line.
    layout: what such a file's columns are.
    """

    separator: str | None = None
    encoding: str | None = None
    rows_key: str | None = None
    sheet: str | None = None
    other_sheets: str | None = None
    quotes: str | None = None
    without: str | None = None
    word_columns: tuple[str, str] | None = None
    layout: str | None = None

    def __str__(self) -> str:
        """Return the line of a plan: all but the defaults, which are commas and UTF-8."""
        names = {sign: name for name, sign in SEPARATORS.items() if name in ("tab", "none")}
        shown = {
            "separator": names.get(self.separator or ",", self.separator) if self.separator != "," else None,
            "encoding": self.encoding if self.encoding != UTF8 else None,
            "rows under": self.rows_key if self.rows_key in (None, COLUMNS) else repr(self.rows_key),
            "sheet": self.sheet,
            "other sheets:": self.other_sheets,
            "quotes": self.quotes,
            "without": self.without,
        }
        found = [f"{name} {value}" for name, value in shown.items() if value]
        return ", ".join([self.layout, *found] if self.layout else found)

    def or_else(self, found: "Form") -> "Form":
        """Return this form, with what was found in a file where nothing is stated."""
        return replace(found, **{name: value for name, value in asdict(self).items() if value is not None})


def suffix_of(path: Path) -> str:
    """Return the suffix that decides how a file is read, without the suffix of its compression."""
    return (path.with_suffix("") if path.suffix.lower() in COMPRESSED else path).suffix.lower()


def is_data(path: Path, form: Form | None = None) -> bool:
    """Whether the name of a file ends in the suffix of a data file. Compressed files hold text.

    With `form.word_columns`, text files with a token on a line are data, too.
    """
    if form is not None and form.word_columns and is_tagged(path):
        return True
    return suffix_of(path) in (TEXTS if path.suffix.lower() in COMPRESSED else BUILDERS)


def is_tagged(path: Path) -> bool:
    """Whether the name of a file ends in the suffix of a text file with tags."""
    return suffix_of(path) in TAGGED and not path.name.upper().startswith(("README", "LICENSE"))


def open_bytes(path: Path) -> IO[bytes]:
    """Open a file, decompressed."""
    suffix = path.suffix.lower()
    if suffix == ".zst":
        import zstandard  # type: ignore[import-not-found]

        return zstandard.open(path, "rb")
    return OPENERS.get(suffix, open)(path, "rb")


@contextmanager
def open_text(path: Path, encoding: str | None = None, newline: str = "\n") -> Iterator[IO[str]]:
    """Open a text file, decompressed, with its line ends unchanged. `newline` is as in `open`."""
    with open_bytes(path) as file, TextIOWrapper(file, encoding or UTF8, newline=newline) as text:
        yield text


def require_text(path: Path, key: str) -> None:
    """Raise InputError if a text file is empty, or begins as a file of another kind."""
    with open_bytes(path) as file:
        start = file.read(16)
    if not start:
        refuse(key, f"{path} is empty", "give at least one row")
    if kind := next((suffix for first, suffix in _BEGINNINGS.items() if start.startswith(first)), None):
        name = path.name + kind if kind in COMPRESSED else path.with_suffix(kind).name
        refuse(key, f"{path} is not text: it begins as a {kind} file", f"rename it to {name}")


def require_library(path: Path, key: str) -> None:
    """Raise InputError unless the library that reads this kind of file is installed."""
    for suffix, library in ((".zst", "zstandard"), (".xlsx", "openpyxl")):
        if path.suffix.lower() == suffix and find_spec(library) is None:
            refuse(key, f"{path} needs the library {library}", f"pip install {library}")


def find_encoding(path: Path, key: str) -> str:
    """Return the encoding of a text file: UTF-8, UTF-16, UTF-32, or a Windows code page.

    Raises:
        InputError: With the line and the byte of the first character that is not UTF-8, if no code page fits.
    """
    with open_bytes(path) as file:
        start = file.read(BLOCK)
    if found := next((name for mark, name in _MARKS if start.startswith(mark)), None):
        return found
    zeros = [start[odd::2].count(0) for odd in (0, 1)]  # of ASCII in UTF-16, every second byte is 0
    if min(zeros) == 0 and max(zeros) > max(2, len(start) // 40):
        return "utf-16-le" if zeros[1] else "utf-16-be"
    if (fault := encoding_fault(path, "utf-8")) is None:
        return UTF8
    if (page := _code_page(_words(path))) is None:
        cure = "save it as UTF-8, or set data.encoding to its encoding, such as cp1252 or shift_jis"
        refuse(key, f"{path} is not UTF-8: {fault}", cure)
    return page


def encoding_fault(path: Path, encoding: str) -> str | None:
    """Return the line and the byte of the first character that is not in this encoding; None without one."""
    decoder, start, line = codecs.getincrementaldecoder(encoding)(), 0, 1
    with open_bytes(path) as file:
        while True:
            block = file.read(BLOCK)
            pending = len(decoder.getstate()[0])
            try:
                decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                line += block[: max(0, error.start - pending)].count(b"\n")
                return f"line {line:,}, byte {start - pending + error.start:,}"
            if not block:
                return None
            start, line = start + len(block), line + block.count(b"\n")


def _words(path: Path, most: int = 20_000) -> Counter[bytes]:
    """Return the first words with letters that are not ASCII, and their number."""
    words: Counter[bytes] = Counter()
    with open_bytes(path) as file:
        while words.total() < most and (block := file.read(BLOCK)):
            words.update(_WORD.findall(block))
    return words


def _code_page(words: Counter[bytes]) -> str | None:
    """Return the code page in which words have the letters of a language. None if there is none.

    Words in UTF-8 beside others mean a damaged file, or a mixture.
    """
    utf8 = sum(number for word, number in words.items() if _fits(word, "utf-8"))
    if 10 * utf8 >= words.total() - utf8:
        return None
    total, scores = 0, dict.fromkeys(_PAGES, 0)
    for word, number in words.items():
        total += number * len(signs := [sign for sign in word if sign >= 0x80])
        for page in _PAGES:
            scores[page] += number * (
                _good_letters(word.decode(page), page) if _fits(word, page) else -len(signs)
            )
    best = max(scores, key=scores.__getitem__)
    return best if scores[best] > 0.7 * total else None


def _fits(word: bytes, encoding: str) -> bool:
    try:
        word.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True


def _good_letters(word: str, page: str) -> int:
    """Return how many signs of a word, ASCII excluded, are where the languages of a code page have them.

    A word of Latin letters has some of ASCII. A word in another alphabet has none.
    """
    letters = [sign for sign in word if sign.isalpha()]
    has_ascii = any(sign < "\x80" for sign in letters)
    if has_ascii if page not in _LATIN else len(letters) > 1 and not has_ascii:
        return 0
    good = 0
    for before, sign, after in zip(f" {word}", word, f"{word[1:]} ", strict=False):
        if sign.isalpha():
            upper = sign.isupper() and (before.islower() if page in _LATIN else before.isalpha())
            last = sign in _LAST and after.isalpha()
            good += sign.lower() in _PAGES[page] and not (upper or last)
        else:
            good += sign in _SIGNS and (sign in "’·" or not (before.isalpha() and after.isalpha()))
    return good
