"""Tables as text: their separator, and the line of each record in the file."""

import csv
import io
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import IO

from gradacc_hf.config.schema import SEPARATORS
from gradacc_hf.data.files import Form, open_text, suffix_of

_SAMPLE = 1 << 18  # characters, from which the separator is found
_RECORDS = 1_000


def records(file: IO[str], form: Form) -> Iterator[tuple[int, list[str]]]:
    """Yield the line, from 1, and the values of each record. Blank lines are left out."""
    csv.field_size_limit(sys.maxsize)
    quoting = csv.QUOTE_NONE if form.quotes else csv.QUOTE_MINIMAL
    reader, line = csv.reader(file, delimiter=form.separator or ",", quoting=quoting), 1
    for values in reader:
        if len(values) > 1 or (values and values[0].strip()):
            yield line, values
        line = reader.line_num + 1


def find_separator(path: Path, encoding: str) -> str:
    """Return the separator that gives the most records as many values as the header has.

    Of separators alike in this, one without a space after it is taken, and then one with more values.
    """
    with open_text(path, encoding, newline="") as file:
        sample = file.read(_SAMPLE)
    first = "\t" if suffix_of(path) == ".tsv" else ","
    scores, widths = {}, {}
    for separator in dict.fromkeys((first, *SEPARATORS.values())):
        rows = [
            values
            for _, values in islice(records(io.StringIO(sample, newline=""), Form(separator)), _RECORDS)
        ]
        if len(sample) == _SAMPLE and 2 < len(rows) < _RECORDS:
            rows.pop()  # it may be incomplete
        header, *others = rows or [[]]
        widths[separator] = {len(values) for values in others}
        fit = sum(len(values) == len(header) for values in others) / max(1, len(others))
        spaced = all(value[:1] == " " for values in rows for value in values[1:])
        if len(header) > 1 or separator == first:
            scores[separator] = (len(header) > 1, fit, not spaced, len(header))
    best = max(scores, key=scores.__getitem__)
    if scores[best][0] or widths[best] <= {1}:
        return best
    alike = [separator for separator, found in widths.items() if len(found) == 1 and min(found) > 1]
    return alike[0] if alike else SEPARATORS["none"]


def table_fault(path: Path, form: Form) -> str | None:
    """Return the line of the first record with more values than columns, or with an open quote."""
    with open_text(path, form.encoding, newline="") as file:
        reader = csv.reader(file, delimiter=form.separator or ",", strict=True)
        line, width = 1, 0
        while True:
            try:
                values = next(reader, None)
            except csv.Error as error:
                if "end of data" in str(error):
                    return f"line {line:,}: a quote opens and does not close"
                values = []
            if values is None:
                return None
            width = width or len(values)
            if len(values) > width:
                return f"line {line:,}: {len(values)} values for {width} column{'s' * (width != 1)}"
            line = reader.line_num + 1


def quotes_are_text(path: Path, form: Form) -> bool:
    """Whether the quotes of a table are part of its texts.

    Each line has as many separators as the header, and a quote closes within a value. A quote may also stay
    open in a table of tabs, which is often written without quoting.
    """
    separator = form.separator or ","
    with open_text(path, form.encoding, newline="") as file:
        numbers = {line.count(separator) for line in file if line.strip()}
        file.seek(0)
        try:
            for _ in csv.reader(file, delimiter=separator, strict=True):
                pass
        except csv.Error as error:
            return len(numbers) == 1 and (separator == "\t" or "end of data" not in str(error))
    return False
