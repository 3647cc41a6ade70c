"""Lint the prose of the project: guides, docstrings, comments and messages.

    python tests/helpers/prose.py                      # the whole project
    python tests/helpers/prose.py gradacc_hf/doctor    # files and folders

proselint matches the words. `prose_words.toml` lists the project's words and the checks of proselint in use.
"""

import ast
import io
import json
import re
import sys
import tokenize
import tomllib
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token
from proselint.checks import __register__ as CHECKS_OF_PROSELINT
from proselint.config import Config
from proselint.registry import CheckRegistry
from proselint.registry.checks import Check, CheckFlags, CheckResult, types
from proselint.registry.checks.engine import Fancy, Padding, RegexOptions
from proselint.tools import LintFile

ROOT = Path(__file__).parents[2]
WORDS = Path(__file__).with_name("prose_words.toml")
SUFFIXES = (".py", ".md", ".yaml", ".sh", ".j2", ".ipynb")
MAX_SENTENCE_WORDS = 25
MAX_FINDINGS = 100_000  # proselint stops at this number in a file
BETWEEN = "\n¶\n"  # between two passages, so that no words match across

Lines = list[tuple[int, str]]
"""Numbered lines of a source file."""


# --- passages: the prose of a file, without its code ---


@dataclass(frozen=True)
class Passage:
    """A paragraph, a list item, a comment or a message, on one line.

    kind: "opening" (first paragraph of a docstring), "docstring", "comment", "message" or "guide".
    text: the words, with placeholders for code, addresses and fields.
    starts: offset in the text and line of the file, for each line of the file.
    """

    kind: str
    text: str
    starts: tuple[tuple[int, int], ...]

    def line_of(self, offset: int) -> int:
        """Return the line in the file of an offset in the text."""
        return self.starts[bisect_right(self.starts, (offset, sys.maxsize)) - 1][1]


@dataclass(frozen=True, order=True)
class Finding:
    """Words that break a rule."""

    file: str
    line: int
    words: str
    rule: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.words}: {self.rule}"


CODE = re.compile(
    r"(?P<url>https?://[^\s)>\]]+)"
    r"|``.+?``|`[^`]+`"  # inline code
    r"|(?<!\w)--?[a-z][\w.-]*"  # a flag
    r"|\b\w+\([^()\s]*\)"  # a call
    r"|\b(?:[A-Za-z_]\w*\.)+[A-Za-z_]\w+(?:\([^()]*\))?"  # a dotted name
    r"|\b\w*_\w+"  # a name
    r"|\{[^{}]*\}"  # a field of str.format, or a dictionary
)


def without_code(text: str) -> str:
    """Replace code, addresses and fields by one word each."""
    return CODE.sub(lambda match: "URL" if match["url"] else "CODE", text)


def joined(kind: str, lines: Lines) -> Passage | None:
    """Join numbered lines to a passage, or return None if they hold no words."""
    whole = "\n".join(line for _, line in lines)
    whole = without_code(re.sub(r"`[^`]+`", lambda match: match[0].replace("\n", " \u2028"), whole))
    text, starts = "", []
    for (number, _), line in zip(lines, [*whole.split("\n"), *([""] * len(lines))], strict=False):
        line = " ".join(line.split())
        if line:
            starts.append((len(text) + bool(text), number))
            text += " " * bool(text) + line
    return Passage(kind, text, tuple(starts)) if re.search(r"[A-Za-z]{2}", text) else None


ITEM = re.compile(
    r"\s*(?:[-*•+]|\d+\.)\s|\s*`{0,2}[\w.*]+`{0,2}(?:, `{0,2}[\w.*]+`{0,2})*(?: \([^)]*\))?:(?:\s|$)"
)
SECTION = re.compile(r"\s*(?:Args|Returns|Raises|Yields|Attributes|Example|Examples|Note|Notes):$")
DISPLAYED = re.compile(r"\s*(?:\||>>>|\$ |\./|gradacc \w|python |pip |torchrun |accelerate launch)")


def passages_of_text(kind: str, lines: Lines) -> Iterator[Passage]:
    """Split plain text at blank lines, list items and fields; leave out tables and displayed code.

    The first passage of a docstring has the kind "opening".
    """
    block: Lines = []
    in_fence, in_section, after_blank, in_display = False, False, True, False
    base = min((len(line) - len(line.lstrip()) for _, line in lines[1:] if line.strip()), default=0)
    blocks: list[Lines] = []
    for place, (number, line) in enumerate(lines):
        indent = len(line) - len(line.lstrip()) - (base if place else 0)
        if line.lstrip().startswith("```"):
            in_fence = not in_fence
            continue
        if not line.strip() or in_fence:
            blocks.append(block)
            block, after_blank = [], True
            continue
        in_section = bool(SECTION.match(line)) or (in_section and indent > 0)
        in_display = indent >= 4 and not in_section and (in_display or (after_blank and bool(place)))
        after_blank = False
        if in_display or DISPLAYED.match(line):
            continue
        if ITEM.match(line) or SECTION.match(line):
            blocks.append(block)
            block = []
        block.append((number, line))
    for place, each in enumerate([each for each in [*blocks, block] if each]):
        passage = joined("opening" if kind == "docstring" and not place else kind, each)
        if passage:
            yield passage


# Python


def passages_of_python(source: str, skip_data: bool = False, is_lesson: bool = False) -> Iterator[Passage]:
    """Extract docstrings, comments and messages from Python code.

    skip_data: leave out strings that are not raised, printed, logged or given as warnings.
    is_lesson: the docstring of the file may open with a question, the title of the lesson.
    """
    tree = ast.parse(source)
    yield from passages_of_comments(python_comments(source))
    documentation = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant | ast.JoinedStr)
    }
    title = id(tree.body[0].value) if is_lesson and ast.get_docstring(tree) else None
    for node, is_shown in strings_of(tree):
        text = text_of(node)
        lines = list(enumerate(text.split("\n"), node.lineno))
        if node.end_lineno - node.lineno + 1 < len(lines):  # escaped line breaks, in one line of code
            lines = [(node.lineno, line) for _, line in lines]
        if id(node) in documentation:
            passages = passages_of_text("docstring", lines)
            yield from (
                (replace(each, kind="docstring") for each in passages) if id(node) == title else passages
            )
        elif is_prose(text, words_in_a_row=2 if is_shown else 3) and (is_shown or not skip_data):
            stripped = [(number, re.sub(r"<[^<>]*>", " ", line)) for number, line in lines]
            yield from passages_of_text("message", stripped)


def strings_of(node: ast.AST, is_shown: bool = False) -> Iterator[tuple[ast.Constant | ast.JoinedStr, bool]]:
    """Walk the strings of a syntax tree: each whole f-string, then the strings in its fields.

    Yield with each string whether it is in a raise statement or in a call that prints.
    """
    if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str)):
        yield node, is_shown
    is_shown = is_shown or isinstance(node, ast.Raise) or (isinstance(node, ast.Call) and prints(node))
    for child in ast.iter_child_nodes(node):
        if not (isinstance(node, ast.JoinedStr) and isinstance(child, ast.Constant)):
            yield from strings_of(child, is_shown)


def prints(call: ast.Call) -> bool:
    """Whether a call prints, logs or warns, by the name of the function."""
    return bool(
        re.search(r"(?:^|\.)(?:print|warn|info|error|debug|warning|log|say|note)\w*$", ast.unparse(call.func))
    )


def text_of(node: ast.Constant | ast.JoinedStr) -> str:
    """Return the text of a string, with a placeholder for each field."""
    if isinstance(node, ast.Constant):
        return node.value
    return "".join(part.value if isinstance(part, ast.Constant) else "VALUE" for part in node.values)


def is_prose(text: str, words_in_a_row: int) -> bool:
    """Whether a string has so many words in a row, and is no regular expression or program."""
    words = re.search(rf"(?:\b[A-Za-z][a-z'-]*[,;:]? ){{{words_in_a_row - 1}}}[A-Za-z]", text)
    return bool(words) and not re.search(
        r"\\[bswdWS]|\(\?[:P=!<]|^\s*(?:def \w+\(|from [\w.]+ import |import \w+$)", text, re.MULTILINE
    )


def python_comments(source: str) -> Iterator[tuple[int, bool, str]]:
    """Yield line, whether the line holds nothing else, and text of each comment."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.line.lstrip().startswith("#"), token.string[1:]


def marked_comments(source: str) -> Iterator[tuple[int, bool, str]]:
    """Yield the comments of a YAML file or a shell script, as `python_comments` does."""
    for number, line in enumerate(source.splitlines(), 1):
        if found := re.search(r"(?:^|\s)#(?!!)(.*)", line):
            yield number, line.lstrip().startswith("#"), found[1]


def passages_of_comments(comments: Iterable[tuple[int, bool, str]]) -> Iterator[Passage]:
    """Join comments on successive lines to one; leave out directives of tools and commands."""
    block: Lines = []
    alone_before = False
    for number, alone, text in comments:
        if re.match(r"\s*(?:noqa|type:|pyright:|fmt:|ruff:|shellcheck|!|SBATCH)", text):
            continue
        if re.match(r"   +\S", text) and alone:  # a command, or a drawing
            text = ""
        if block and not (alone and alone_before and number == block[-1][0] + 1):
            yield from passages_of_text("comment", block)
            block = []
        block.append((number, text))
        alone_before = alone
    yield from passages_of_text("comment", block)


# guides and templates


def passages_of_markdown(source: str, first_line: int = 1) -> Iterator[Passage]:
    """Extract headings, paragraphs and list items; leave out code, tables and HTML."""
    in_table = False
    for token in MarkdownIt("commonmark").enable("table").parse(source):
        if token.type in ("table_open", "table_close"):
            in_table = token.type == "table_open"
        if token.type == "inline" and not in_table and token.map:
            passage = joined("guide", lines_of_inline(token, token.map[0] + first_line))
            if passage:
                yield passage


def lines_of_inline(token: Token, number: int) -> Lines:
    """Return the numbered lines of a paragraph, without markup."""
    lines = [(number, "")]
    for child in token.children or []:
        number, text = lines[-1]
        match child.type:
            case "text":
                lines[-1] = (number, text + child.content)
            case "code_inline" | "image":
                lines[-1] = (number, text + "CODE")
            case "softbreak" | "hardbreak":
                lines.append((number + 1, ""))
    return lines


def without_jinja(source: str) -> str:
    """Replace the fields of a Jinja template by a placeholder, and blank its statements."""
    keep_lines = lambda match: "\n" * match[0].count("\n")  # noqa: E731
    source = re.sub(r"\{#.*?#\}|\{%.*?%\}", keep_lines, source, flags=re.DOTALL)
    return re.sub(r"\{\{.*?\}\}", lambda match: "VALUE" + keep_lines(match), source, flags=re.DOTALL)


class HtmlText(HTMLParser):
    """Collects the lines of text of a page, a passage for each element that is no inline markup."""

    INLINE = frozenset({"a", "b", "em", "i", "span", "strong", "small", "sub", "sup"})
    LEFT_OUT = frozenset({"style", "script", "code", "pre", "title", "td"})

    def __init__(self) -> None:
        super().__init__()
        self.blocks: list[Lines] = [[]]
        self.within: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.within += [tag] if tag in self.LEFT_OUT else []
        if tag not in self.INLINE:
            self.blocks.append([])

    def handle_endtag(self, tag: str) -> None:
        if self.within and self.within[-1] == tag:
            self.within.pop()
        if tag not in self.INLINE:
            self.blocks.append([])

    def handle_data(self, data: str) -> None:
        if not self.within:
            self.blocks[-1] += enumerate(data.split("\n"), self.getpos()[0])


def passages_of_html(source: str) -> Iterator[Passage]:
    """Extract the text of a page, without tables, styles and scripts."""
    page = HtmlText()
    page.feed(source)
    yield from filter(None, (joined("message", block) for block in page.blocks))


def passages_of(path: Path) -> Iterator[Passage]:
    """Extract the prose of a file."""
    source = path.read_text(encoding="utf-8")
    match path.suffixes[-2:]:
        case [*_, ".py"]:
            is_lesson = path.parent.name == "lessons"
            yield from passages_of_python(source, skip_data="embedded" in path.parts, is_lesson=is_lesson)
        case [*_, ".md"]:
            yield from passages_of_markdown(source)
        case [".md", ".j2"]:
            yield from passages_of_markdown(without_jinja(source))
        case [".html", ".j2"]:
            yield from passages_of_html(without_jinja(source))
        case [*_, ".ipynb"]:
            for cell in json.loads(source)["cells"]:
                if cell["cell_type"] == "markdown":
                    yield from passages_of_markdown("".join(cell["source"]))
        case _:
            yield from passages_of_comments(marked_comments(source))


# --- checks ---


@cache
def rules() -> dict[str, object]:
    """Return the word list."""
    return tomllib.loads(WORDS.read_text(encoding="utf-8"))


ANY_CASE, BY_LINES = RegexOptions(), RegexOptions(multi_line=True)
EVERYWHERE = CheckFlags(allow_quotes=True)


def long_sentences(text: str, check: Check) -> Iterator[CheckResult]:
    """Find the sentences above `MAX_SENTENCE_WORDS` words; a line of the text is a passage."""
    for line in re.finditer(r".+", text):
        begin = line.start()
        for end in [*sentence_ends(line[0]), len(line[0])]:
            span = (begin, line.start() + end)
            words = [word for word in text[slice(*span)].split() if re.search(r"\w", word)]
            if len(words) > MAX_SENTENCE_WORDS:
                yield CheckResult(check.path, check.message.format(len(words)), span, None)
            begin = line.start() + end


def sentence_ends(line: str) -> Iterator[int]:
    """Yield the offset behind each sentence of a line but the last."""
    for stop in re.finditer(r"(?<![.\d][A-Za-z])[.!?][\"')\]*]*\s+", line):
        if not re.search(
            r"(?:\b(?:e\.g|i\.e|cf|vs|etc|Eq|eq|Sec|Fig|approx|No|p|pp)|\s[A-Z])\.\s*$", line[: stop.end()]
        ):
            yield stop.end()


def project_checks() -> Iterator[Check]:
    """Build the project's checks from the word list."""
    words = rules()
    people = "".join(rf"(?<!\b{person} )" for person in words["people"]["subjects"])
    for name, table in words["words"].items():
        before = people if name == "people_verbs" else ""
        forms = {f"(?:{before}(?:{pattern}))": instead for pattern, instead in table.items()}
        preferred = types.PreferredForms(forms, Padding.WORDS_IN_TEXT)
        yield Check(preferred, Fancy(ANY_CASE), f"gradacc.words.{name}", f"{name}: write {{0}}", EVERYWHERE)
    for pattern, advice in words["openings"].items():
        starts = types.ExistenceSimple(rf"^{pattern}")
        yield Check(starts, Fancy(BY_LINES), "gradacc.opening", f"opening: write {advice}", EVERYWHERE)
    message = f"long sentence: {{0}} words, at most {MAX_SENTENCE_WORDS}"
    yield Check(long_sentences, path="gradacc.length", message=message, flags=EVERYWHERE)


@cache
def register() -> dict[str, bool]:
    """Register the checks with proselint; return the names of the checks in use."""
    registry = CheckRegistry()
    registry.register_many(CHECKS_OF_PROSELINT)
    registry.register_many(tuple(project_checks()))
    return {**dict.fromkeys(rules()["proselint"]["checks"], True), "gradacc.words": True}


def enabled(kind: str) -> Config:
    """Return the configuration of proselint for a kind of passage."""
    checks = dict(register())
    checks["gradacc.opening"] = kind == "opening"
    checks["gradacc.length"] = kind != "comment"
    return Config(max_errors=MAX_FINDINGS, checks=checks)


def lint_passages(name: str, passages: Iterable[Passage]) -> list[Finding]:
    """Return the findings of the passages of a file, sorted by line."""
    found = []
    by_kind: dict[str, list[Passage]] = {}
    for passage in passages:
        by_kind.setdefault(passage.kind, []).append(passage)
    for kind, members in by_kind.items():
        begins = [0]
        for passage in members:
            begins.append(begins[-1] + len(passage.text) + len(BETWEEN))
        file = LintFile(name, BETWEEN.join(passage.text for passage in members))
        for result in longest(each.check_result for each in file.lint(enabled(kind))):
            begin, end = result.span
            text = file.content[begin:end]
            if result.check_path == "lexical_illusions" and re.search(r"CODE|VALUE|\d \d", text):  # no words
                continue
            begin += len(text) - len(text.lstrip()) - 1  # proselint puts a line break before the content
            place = bisect_right(begins, begin) - 1
            line = members[place].line_of(begin - begins[place])
            found.append(Finding(name, line, shortened(text), result.message))
    return sorted(found)


def longest(results: Iterable[CheckResult]) -> Iterator[CheckResult]:
    """Leave out results inside a longer result of the same check."""
    ends: dict[str, int] = {}
    for result in sorted(results, key=lambda result: (result.span[0], -result.span[1])):
        if result.span[1] > ends.get(result.check_path, 0):
            ends[result.check_path] = result.span[1]
            yield result


def shortened(text: str, words: int = 8) -> str:
    """Return the first words of a text."""
    parts = text.split()
    return " ".join(parts[:words]) + " …" * (len(parts) > words)


def lint(path: Path) -> list[Finding]:
    """Return the findings of a file."""
    name = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
    return lint_passages(name, passages_of(path))


def files_under(path: Path) -> list[Path]:
    """Return the files with prose in a folder, or the file itself."""
    if path.is_file():
        return [path]
    return sorted(
        each for each in path.rglob("*") if each.suffix in SUFFIXES and not {".git", ".venv"} & {*each.parts}
    )


def main(arguments: list[str]) -> int:
    """Print the findings and the number of findings for each rule; return 1 if there are any."""
    places = arguments or ["README.md", "CONTRIBUTING.md", "gradacc_hf", "recipes", "configs", "launch.sh"]
    base = Path.cwd() if arguments else ROOT
    found = [
        each for place in places for path in files_under((base / place).resolve()) for each in lint(path)
    ]
    for finding in found:
        print(finding)
    counts = Counter(finding.rule.split(":")[0] for finding in found)
    print(
        "\n".join([f"{len(found)} findings", *(f"{count:6} {rule}" for rule, count in counts.most_common())])
    )
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
