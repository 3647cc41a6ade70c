"""The guides, and what is in them: code blocks, commands, links and headings."""

import re
import shlex
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from conftest import ROOT

README = ROOT / "README.md"
GUIDES = (
    README,
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "gradacc_hf").rglob("*.md")),
    *sorted((ROOT / "recipes").rglob("*.md")),
    *sorted((ROOT / "configs").rglob("*.md")),
)
LANGUAGES = {"sh", "console", "python", "diff", "jsonl", "yaml", ""}

FENCE = re.compile(
    r"(?:^<!-- (?P<note>[^\n]*) -->\n)?^(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """A code block of a guide; `note` is the HTML comment above it, such as "not run: it needs a GPU"."""

    file: Path
    line: int
    language: str
    text: str
    note: str

    @property
    def name(self) -> str:
        """The file and the line where the block begins."""
        return f"{self.file.relative_to(ROOT)}:{self.line}"

    @property
    def runs(self) -> bool:
        """Whether tests run the block; if not, the note has the reason."""
        return not self.note.startswith("not run: ")

    @property
    def commands(self) -> list[str]:
        """The commands of a shell block, or the command of a console block, without comments."""
        if self.language == "console":
            return [self.text.splitlines()[0].removeprefix("$ ")]
        lines = self.text.replace("\\\n", " ").splitlines()
        return [shlex.join(words) for line in lines if (words := shlex.split(line, comments=True))]


def blocks(*languages: str) -> list[Block]:
    """All code blocks of the guides in these languages."""
    return [
        Block(
            file,
            line_of(file, found),
            found["language"],
            found["text"],
            found["note"] or "",
        )
        for file in GUIDES
        for found in FENCE.finditer(read(file))
        if found["language"] in languages
    ]


@cache
def read(file: Path) -> str:
    """The text of a guide."""
    return file.read_text(encoding="utf-8")


def prose(file: Path) -> str:
    """The text without code blocks and HTML comments."""
    return re.sub(r"<!--.*?-->", "", FENCE.sub("", read(file)), flags=re.DOTALL)


def links(text: str) -> list[str]:
    """The targets of all links and pictures of a Markdown text, without those in code."""
    return LINK.findall(re.sub(r"`[^`\n]+`", "``", FENCE.sub("", text)))


def anchors(file: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a guide."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", prose(file), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", text).strip().replace(" ", "-")
        repeats = sum(
            other == slug or re.fullmatch(rf"{re.escape(slug)}-\d+", other) is not None for other in found
        )
        found.add(f"{slug}-{repeats}" if repeats else slug)
    return found


def line_of(file: Path, block: re.Match) -> int:
    """The line of a guide where a code block begins."""
    return read(file).count("\n", 0, block.start("language")) + 1


def check_absolute(text: str, homepage: str) -> None:
    """Assert that the README, as PyPI gets it, has absolute links to what exists in the repository."""
    raw = homepage.replace("github.com", "raw.githubusercontent.com")
    found = links(text)
    assert len(found) == len(links(read(README))) > 20
    for link in found:
        if link.startswith("#"):  # a heading of the same page
            assert link[1:] in anchors(README), link
            continue
        assert re.match(r"https://[\w-]+(\.[\w-]+)+/", link), link
        for root in (f"{homepage}/blob/main/", f"{raw}/main/"):
            assert not link.startswith(root) or (ROOT / link.removeprefix(root).partition("#")[0]).exists(), (
                link
            )
    pictures = re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", text)
    assert pictures
    assert all(picture.startswith(f"{raw}/main/") for picture in pictures)
    code = [found["text"] for found in FENCE.finditer(text)]
    assert code == [found["text"] for found in FENCE.finditer(read(README))]
