"""`gradacc data`: the data that a run uses, as the model receives them."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from operator import itemgetter

from rich.bar import Bar
from rich.box import SIMPLE
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from gradacc_hf.data.reading import SPLITS, counted
from gradacc_hf.errors import GradaccError, InputError, listed, refuse
from gradacc_hf.recipe.loading import load_recipe
from gradacc_hf.run.decoded import Piece
from gradacc_hf.run.inspection import Inspection, LengthSummary, inspect_data
from gradacc_hf.run.runner import quieten_libraries
from gradacc_hf.utils.commands import Parser

SHOWN_LABELS = 12
LONGEST_PIECE, LONGEST_TEXT, LONGEST_DUPLICATE = 800, 1600, 100  # characters that are shown
LEARNED, MARK = "black on bright_green", "green"
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def main(argv: Sequence[str]) -> None:
    """Run the command. The exit code is 1 if a run would refuse the data."""
    parser = Parser(
        prog="gradacc data",
        description="Show the data that a run uses: files, columns, examples as the model receives them, "
        "lengths, labels and duplicates. It needs no weights and writes nothing. The exit code is 1 if the "
        "run would refuse the data, and 0 if not.",
        epilog="Settings of the recipe may follow, such as --data.train my.csv.",
    )
    parser.add_argument("--config", required=True, help="the recipe's config file")
    parser.add_argument("--budget", default="auto", help="a budget's name or file (default: %(default)s)")
    parser.add_argument("--examples", type=int, default=3, help="examples to show (default: %(default)s)")
    parser.add_argument(
        "--split",
        choices=("train", "validation"),
        default="train",
        help="the data that these examples are from (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments, settings = parser.parse_known_args(argv)
    if arguments.examples < 0:
        refuse("--examples", f"found {arguments.examples}", "allowed: 0 or more")
    quieten_libraries()
    split = "training" if arguments.split == "train" else "validation"
    try:
        recipe = load_recipe(["--config", arguments.config, "--budget", arguments.budget, *settings])
        found = inspect_data(recipe, arguments.examples, split)
    except InputError as error:
        raise GradaccError(str(error)) from None  # exit code 1
    if arguments.json:
        print(json.dumps(found.as_json(), indent=2))
    else:
        show(found, Console(highlight=False))
    if found.refused:
        raise GradaccError(found.refused)  # exit code 1


def show(found: Inspection, console: Console) -> None:
    """Print files, columns, examples, lengths, labels and duplicates."""
    for name, text in found.lines:
        if name != "truncated":  # follows with the lengths
            _line(console, name, text)
    for source, columns in (found.columns_of_sources or {"": found.columns}).items():
        _line(console, "columns", f"{source}: {_used(columns)}" if source else _used(columns))
    show_examples(found, console)
    show_lengths(found, console)
    show_labels(found, console)
    show_duplicates(found, console)


def _used(columns: Mapping[str, str | None]) -> str:
    """Return the used columns as text, each group with its setting."""
    used = [(name, setting) for name, setting in columns.items() if setting is not None]
    groups = (
        (listed(name for name, _ in group), setting) for setting, group in groupby(used, key=itemgetter(1))
    )
    return listed(f"{names} ({setting})" if setting else names for names, setting in groups) or "none is used"


def _line(console: Console, name: str, text: str) -> None:
    console.print(Text(f"{name:<22}{_visible(text)}"), soft_wrap=True)


def show_examples(found: Inspection, console: Console) -> None:
    """Print examples, with the learned parts in colour, or in «» without colours."""
    colour = console.is_terminal and not console.no_color
    key = _marked(Text(", "), [Piece("learned", "learned")], colour)
    for example in found.examples:
        line = Text().append(f"\n{found.split} example {example.number:,}", "bold")
        line.append(f" of {found.rows[found.split]:,}, {counted(example.tokens, 'token')}")
        line.append("" if example.weight is None else f", weight {example.weight:g}")
        line.append("" if example.source is None else f", source {_visible(example.source)}")
        console.print(line.append_text(key))
        key = Text()  # once
        texts = [(part.name, part.pieces) for part in example.texts]
        if example.labels:
            spaced = [(Piece(" " * bool(i)), Piece(label, label)) for i, label in enumerate(example.labels)]
            texts.append(("label", [piece for both in spaced for piece in both]))
        for name, pieces in texts:
            text = _marked(Text().append(f"{name}: " if name else "", "bold"), pieces, colour)
            text.rstrip()  # a chat ends with a line end
            console.print(Padding(text, (0, 0, 0, 2), expand=False))
    console.print()


def _marked(text: Text, pieces: Iterable[Piece], colour: bool) -> Text:
    """Append parts to a text. The middle of a long part, and the end of a long text, are left out."""
    left, after_mark = LONGEST_TEXT, False
    for piece in pieces:
        if left <= 0:
            text.append(" …", "dim")
            break
        shown = _visible(piece.text)
        if len(shown) > LONGEST_PIECE:
            half = LONGEST_PIECE // 2
            shown = f"{shown[:half].rstrip()} … {shown[-half:].lstrip()}"
        left -= len(shown)
        text.append(" " * (after_mark and piece.learned is not None))
        after_mark = bool(piece.mark)
        if piece.learned is None:
            text.append(shown)
        elif colour:
            text.append(shown, LEARNED).append(_visible(piece.mark), MARK)
        else:
            text.append(f"«{shown}{_visible(piece.mark)}»")
    return text


def _visible(text: str) -> str:
    """Return a text whose control characters are written out, so that they do not reach the terminal."""
    return _CONTROL.sub(lambda found: repr(found[0])[1:-1], text)


def show_lengths(found: Inspection, console: Console) -> None:
    """Print the lengths of each input, as a histogram for the training examples, and what is truncated."""
    for split in SPLITS:
        for name, lengths in found.lengths[split].items():
            of_input = f"{split} lengths" if name == "tokens" else f"{split} {name}"
            line = f"median {lengths.median:,.0f}, 95 % up to {lengths.p95:,.0f}, longest {lengths.max:,}"
            _line(console, of_input, f"{line} tokens")
            if split == "training" and lengths.min < lengths.max:
                console.print(Padding(_histogram(lengths), (0, 0, 0, 22)))
    for truncation in found.truncated:
        shares = {
            split: number / max(1, truncation.of_rows[split]) for split, number in truncation.rows.items()
        }
        of_rows = listed(f"{share:.1%} of the {split} rows" for split, share in shares.items() if share)
        _line(console, "truncated", f"{truncation} ({of_rows})")
    if not found.truncated:
        _line(console, "truncated", "nothing")


def _histogram(lengths: LengthSummary) -> Table:
    """Return a row for each bin."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(justify="right")
    table.add_column(justify="right")
    most = max(number for *_, number in lengths.histogram)
    for low, high, number in lengths.histogram:
        bins = f"{low:,}" if low == high else f"{low:,} to {high:,}"
        table.add_row(bins, Bar(most, 0, number, width=30), f"{number:,}")
    return table


def show_labels(found: Inspection, console: Console) -> None:
    """Print the number and the share of each label, the most frequent first; of numbers, the range."""
    if not any(found.labels.values()):
        return
    if found.kind_of_labels == "numbers":
        for split, counts in found.labels.items():
            _line(console, f"{split} labels", listed(f"{name} {value:g}" for name, value in counts.items()))
        return
    table = Table(found.kind_of_labels, box=SIMPLE)
    for split in SPLITS:
        table.add_column(split, justify="right")
        table.add_column("share", justify="right")
    of_all = {
        split: found.rows[split] if found.kind_of_labels == "sets" else sum(counts.values())
        for split, counts in found.labels.items()
    }
    names = sorted(
        {name: 0 for counts in found.labels.values() for name in counts},
        key=lambda name: -found.labels["training"].get(name, 0),
    )
    for name in names[:SHOWN_LABELS]:
        numbers = [(found.labels[split].get(name, 0), max(1, of_all[split])) for split in SPLITS]
        cells = [cell for number, of_split in numbers for cell in (f"{number:,}", f"{number / of_split:.1%}")]
        table.add_row(Text(_visible(name)), *cells)
    if (more := len(names) - SHOWN_LABELS) > 0:
        table.add_row(f"{more:,} more", *[""] * 4)
    console.print(table)


def show_duplicates(found: Inspection, console: Console) -> None:
    """Print the number of examples with the same inputs, with one of them."""
    if not any(equal.number for equal in found.duplicates.values()):
        _line(console, "duplicates", "none, in a split or in both")
    for name, equal in found.duplicates.items():
        if not equal.number:
            continue
        split = "validation" if name == "both" else name
        of_all = f"{equal.number:,} of {counted(found.rows[split], f'{split} example')}"
        same = "have the inputs of a training example" if name == "both" else "repeat an earlier example"
        line = f"{of_all} {same}"
        text = " ".join((equal.text or "").split())
        short = text if len(text) <= LONGEST_DUPLICATE else f"{text[:LONGEST_DUPLICATE]} …"
        _line(console, "duplicates", f"{line}, such as {equal.first:,} = {equal.other:,}: {short}")
