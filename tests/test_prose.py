"""The rules of CONTRIBUTING, "Prose", held over every guide, docstring, comment and message.

python -m pytest tests/test_prose.py -k doctor    # one package and its guide
python tests/helpers/prose.py PATH...             # only print the findings
"""

import textwrap

import prose
import pytest

ROOT = prose.ROOT
PACKAGE = ROOT / "gradacc_hf"


def places() -> dict[str, list]:
    """Return the files to lint by place: each package, the other folders, and each guide by itself."""
    found = {
        path.parent.name: prose.files_under(path.parent) for path in sorted(PACKAGE.glob("*/__init__.py"))
    }
    found["top_level_modules"] = sorted(PACKAGE.glob("*.py"))
    found |= {folder: prose.files_under(ROOT / folder) for folder in ("recipes", "configs")}
    found["launch.sh"] = [ROOT / "launch.sh"]
    guides = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    guides += sorted(
        path for folder in ("gradacc_hf", "recipes", "configs") for path in (ROOT / folder).rglob("*.md")
    )
    found = {place: [path for path in paths if path.suffix != ".md"] for place, paths in found.items()}
    return found | {str(path.relative_to(ROOT)): [path] for path in guides}


PLACES = places()


@pytest.mark.parametrize("place", PLACES)
def test_prose_follows_the_rules(place):
    findings = [finding for path in PLACES[place] for finding in prose.lint(path)]
    assert not findings, "\n".join(["", *map(str, findings), f"{len(findings)} findings"])


def rules_in(source, extract=prose.passages_of_python):
    """Return line and rule of each finding in a text."""
    passages = extract(textwrap.dedent(source).lstrip("\n"))
    return {(finding.line, finding.rule.split(":")[0]) for finding in prose.lint_passages("text", passages)}


def rules_of(sentence):
    """Return the rules that a paragraph of a guide breaks."""
    return {rule for _, rule in rules_in(sentence, prose.passages_of_markdown)}


BAD = {
    "archaisms": [
        "Measure anew.",
        "nobody knows the length.",
        "It heeds the limit.",
        "A step mends this.",
        "Measure in every so manieth window.",
        "The stream has come to its end.",
        "Windows gone by are left out.",
        "A loss is missing for want of a metric.",
        "Wait, lest it stop early.",
        "Whoever reads it is warned.",
        "A file, be it large or small, is read.",
        "The second is not so fast as the first.",
        "It has not the digits.",
        "Texts are laid end to end.",
        "A window thereby ends, whereof the last example is cut.",
        "Whence the loss comes is unclear.",
        "The way of old is in no wise slower.",
        "It shall stop.",
        "A file is in truth a folder.",
        "Split every one of them.",
        "Each who looks is counted.",
        "All the same, it stops.",
        "All files save for one are read.",
        "It costs as many times as the other.",
        "The rest is filled as with sand.",
        "The run goes on.",
        "Were it larger, memory would run out.",
        "A window is trained in vain.",
        "The process is gone.",
        "The probe finds out the size.",
        "It is none of the allowed values.",
        "What is no table raises an error.",
    ],
    "riddles": [
        "The time is that of the window.",
        "Take the one that fits.",
        "Files, the first of which is read, are listed.",
        "Our weights are equal to theirs.",
        "Each session has a process of its own.",
        "It reads the header and no more.",
    ],
    "people_verbs": [
        "The loader knows the size.",
        "The report says so.",
        "The loss is told the number.",
        "The process tells the two apart.",
        "The doctor saw two steps.",
        "A rank hears of it.",
        "The loader asks for memory.",
        "The window wants a budget.",
        "The budget is honoured.",
        "The thread dozes.",
        "It is woken by a signal.",
        "The run forgets a bound.",
        "The loader remembers the position.",
        "It thinks that the batch is full.",
        "The loop notices an error.",
        "Nothing minds the order.",
        "The loss cannot know the number.",
        "The shape has been seen before.",
        "Read the logs, which say why.",
        "The run gives up.",
        "A number is taken for a name.",
        "The graph lets go of tensors.",
    ],
    "field": [
        "The kit splits windows.",
        "This is the kit's loop.",
        "The same with ours.",
        "Windows are cut by length.",
        "Texts are cut off at 256 tokens.",
        "Each piece is run.",
    ],
    "long sentence": ["It " + "adds one word " * 8 + "too much."],
    "There's a lexical illusion in 'the the' - a phrase is repeated.": ["Read the the file."],
}


@pytest.mark.parametrize(
    ("rule", "sentence"), [(rule, each) for rule, members in BAD.items() for each in members]
)
def test_bad_sentences_are_found(rule, sentence):
    assert rule in rules_of(sentence)


@pytest.mark.parametrize("table", prose.rules()["words"])
def test_each_line_of_the_word_list_has_a_bad_sentence(table):
    text = "\n\n".join(BAD[table])
    checks = [check for check in prose.project_checks() if check.path == f"gradacc.words.{table}"]
    idle = [
        pattern
        for check in checks
        for pattern, advice in check.check_type.items.items()
        if not any(type(check.check_type)({pattern: advice}).check(f"\n{text}\n", check))
    ]
    assert checks
    assert idle == []


GOOD = [
    "Return the indices of the examples in a window.",
    "Ask the user before you delete a run.",
    "A reader who knows Trainer, and a user who asks for help, find the loop here.",
    "You said 64 examples; you can see the split in the report.",
    "There is no padding, and the number is no longer needed.",
    "The shortcut of the toolkit is a cutoff.",
    "There are two files, each of which has a word piece in every row.",
    "The length of a stream is unknown until it has been read to the end.",
    "The names `nobody` and `heed`, https://example.org/anew, loader.saw(1) and --said are code.",
    "Use short sentences, e.g. this one. " * 10,
    "The optimizer steps once a window. Its weights are in float32.",
    "```\nnobody heeds the kit\n```\n",
    "| bad | good |\n|---|---|\n| nobody heeds the kit | no sentence |\n",
]


@pytest.mark.parametrize("sentence", GOOD)
def test_good_sentences_are_not_found(sentence):
    assert rules_of(sentence) == set()


@pytest.mark.parametrize(
    "opening",
    [
        "What the loader stores.",
        "Which sizes are tried.",
        "Where a file lies.",
        "How much it costs.",
        "Who set a value.",
        "Whose gradient it is.",
        "Why a window failed.",
        "Is this the last window.",
        "Exact on this model?",
        "Returns the size.",
    ],
)
def test_openings_of_docstrings_are_found_and_only_there(opening):
    body = 'def f():\n    """First.\n\n    {}\n    """\n'
    assert rules_in(f'def f():\n    """{opening}"""\n') == {(2, "opening")}
    assert rules_in(body.format(opening)) == set()
    assert rules_in(f"# {opening}\n") == set()


@pytest.mark.parametrize(
    "opening", ["Return the size.", "Whether all examples fit.", "A window.", "Do nothing."]
)
def test_other_openings_are_fine(opening):
    assert rules_in(f'def f():\n    """{opening}"""\n') == set()


def test_docstrings_comments_and_messages_of_python_are_read():
    source = '''
        """The kit.

        One line is

            nobody    # an example of code
        """

        #: nobody
        # A comment that ends in
        # the kit, over two lines.
        SIZE = 1  # anew
        FORMAT = "nobody"  # one word


        def f(x):
            """Return x.

            Args:
                x: the number that nobody
                    heeds.
            """
            if x:
                raise ValueError(f"found {x!r}, which is {'nobody heeds' if x else ''} the kit")
            print("nobody heeds")
            return "a table of words that nobody reads"
    '''
    found = rules_in(source)
    assert {line for line, rule in found if rule == "archaisms"} == {8, 11, 19, 20, 23, 24, 25}
    assert {line for line, rule in found if rule == "field"} == {1, 10, 23}


def test_only_messages_are_read_where_strings_are_data():
    source = 'X = "a table of words that nobody reads"\nprint("what nobody reads")\n'
    assert rules_in(source, lambda text: prose.passages_of_python(text, skip_data=True)) == {(2, "archaisms")}


def test_the_title_of_a_lesson_may_be_a_question():
    source = '"""Why accumulate? Read this."""\n\n\ndef f():\n    """Why here?"""\n'
    assert rules_in(source, lambda text: prose.passages_of_python(text, is_lesson=True)) == {(5, "opening")}


def test_comments_of_yaml_and_templates_are_read(tmp_path):
    (tmp_path / "a.yaml").write_text("# The kit's\n#   ./launch.sh cut\nkey: 1  # anew\n")
    (tmp_path / "a.md.j2").write_text("{% if nobody %}\nIt {{ heed }} the kit.\n{% endif %}\n")
    (tmp_path / "a.html.j2").write_text("<style>cut</style>\n<p>It is {{ us }}\nthe <b>kit</b></p>")
    found = [(each.file[-4:], each.line) for name in sorted(tmp_path.iterdir()) for each in prose.lint(name)]
    assert found == [("l.j2", 3), ("d.j2", 2), ("yaml", 1), ("yaml", 3)]


def test_the_program_prints_findings_and_fails(tmp_path, capsys):
    (guide := tmp_path / "guide.md").write_text("Fine.\n\nThat\nnobody reads.\n")
    assert prose.main([str(guide)]) == 1
    assert f"{guide}:4: nobody: archaisms: write no one" in capsys.readouterr().out
    guide.write_text("Fine.\n")
    assert prose.main([str(guide)]) == 0
