"""data/reading.py: what the plan, the summary and the report state about the data."""

from pathlib import Path

import datasets.config
import pytest
from datasets import Dataset, Image, concatenate_datasets
from recipe_runs import load_recipe, make_recipe, summary, with_defaults, write_rows

from gradacc_hf.data.files import ALLOWED
from gradacc_hf.data.loading import load_data
from gradacc_hf.data.reading import SHOWN, Reading, tokens_lost
from gradacc_hf.embedded import minilm_path
from gradacc_hf.errors import InputError
from gradacc_hf.run import fingerprint
from gradacc_hf.run.fingerprint import duplicates_note

ROWS = [{"text": f"text {i}", "label": "odd" if i % 2 else "even"} for i in range(40)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)


def csv(path, rows):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in rows))


def jsonl(path, rows):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    return write_rows(path, rows)


def read(train, validation=None):
    """The splits, and the lines about them after the recipe has named its columns."""
    splits = load_data(train, validation, validation_fraction=0.1, seed=0)
    splits.reading.use(["text", "label"])
    return splits, splits.reading.lines()


def test_files_of_two_kinds_in_one_folder_are_all_read():
    jsonl("set/a.jsonl", ROWS[:30])
    csv("set/b.csv", ROWS[30:])
    splits, lines = read("set")
    assert sorted([*splits.train["text"], *splits.validation["text"]]) == sorted(r["text"] for r in ROWS)
    assert lines == [("read", "set/a.jsonl: 30 rows, training"), ("read", "set/b.csv: 10 rows, training")]


def test_every_file_of_a_folder_that_is_not_read_is_named():
    csv("set/my_training.csv", ROWS)
    csv("set/my_heldout.csv", ROWS)
    csv("set/.old.csv", ROWS)
    Path("set/more.docx").touch()
    Path("set/README.md").write_text("# About\n")
    Path("set/dataset_info.json").write_text("{}")
    splits, lines = read("set")
    assert len(splits.train) == 36
    assert lines == [
        ("read", "set/my_training.csv: 40 rows, training"),
        ("not read", "set/.old.csv: a hidden file"),
        ("not read", "set/dataset_info.json: a description, not data"),
        ("not read", f"set/more.docx: allowed: {ALLOWED}"),
        (
            "not read",
            "set/my_heldout.csv: no single split in its name, unlike in train; "
            "to use it, set data.validation to it",
        ),
    ]


def test_files_that_are_not_read_for_one_reason_are_one_line_with_their_number():
    csv("set/a.csv", ROWS)
    for number in range(300):
        Path(f"set/{number:03}.png").touch()
        Path(f"set/{number:03}").touch()
    _, lines = read("set")
    kinds = f"allowed: {ALLOWED}"
    assert [text for name, text in lines if name == "not read"] == [
        f"300 files without suffix, such as set/000: {kinds}",
        f"300 .png files, such as set/000.png: {kinds}",
    ]


def test_splits_that_are_not_used_are_named():
    for name, rows in (("train/a", ROWS), ("validation/b", ROWS[:5]), ("test/c", ROWS[:3])):
        csv(f"set/{name}.csv", rows)
    csv("set/extra.csv", ROWS[:7])
    splits, lines = read("set")
    assert (len(splits.train), len(splits.validation)) == (40, 5)
    assert ("read", "set/validation/b.csv: 5 rows, validation") in lines
    assert ("not used", "set/test/c.csv: 3 rows") in lines
    assert any(name == "not read" and text.startswith("set/extra.csv: ") for name, text in lines)
    _, lines = read("set", "test")
    assert ("not used", "set/validation/b.csv: 5 rows") in lines


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("data/test-00000-of-00001.csv", "test"),
        ("x/valid/a.csv", "validation"),
        ("my dev_2.csv", "validation"),
    ],
)
def test_files_have_the_splits_that_datasets_gives_them(name, split):
    csv("set/" + ("data/train-00000-of-00001.csv" if name.startswith("data") else "x/train/b.csv"), ROWS)
    if name.startswith("my"):
        Path("set/x/train/b.csv").rename("set/train.csv")
        Path("set/x/train").rmdir()
    csv(f"set/{name}", ROWS[:4])
    expected = datasets.load_dataset(str(Path("set").resolve()))
    assert {name: len(rows) for name, rows in expected.items()} == {"train": 40, split: 4}
    found, lines = read("set", split)
    assert (len(found.train), len(found.validation)) == (40, 4)
    assert not any(name == "not read" for name, _ in lines)


def test_words_of_splits_may_be_in_any_case():
    csv("set/Train.csv", ROWS)
    csv("set/My TEST.csv", ROWS[:4])
    splits, _ = read("set")
    assert (len(splits.train), len(splits.validation)) == (40, 4)


def test_columns_that_nothing_uses_are_named_and_refuse_no_file():
    csv("a.csv", [])
    rows = "".join(f"row {i},{'ab'[i % 2]},{'' if i < 10_000 else 'remark'}\n" for i in range(10_050))
    Path("a.csv").write_text("text,label,note\n" + rows)
    splits, lines = read("a.csv")
    assert len(splits.train) + len(splits.validation) == 10_050
    assert lines[1:] == [("ignored", "1 column that nothing uses: note")]


def test_a_column_that_a_file_lacks_is_stated_only_if_it_is_used():
    jsonl("set/a.jsonl", [{**row, "id": i} for i, row in enumerate(ROWS)])
    jsonl("set/b.jsonl", [{"text": "x"}])
    _, lines = read("set")
    assert ("merged", "column 'label' is empty for the rows of b.jsonl, which lack it") in lines
    assert not any("'id'" in text for _, text in lines)


def test_of_many_lines_the_first_are_shown_and_all_are_in_the_summary():
    reading = Reading()
    for number in range(SHOWN + 5):
        reading.note("not read", f"{number}.txt")
    assert reading.lines()[-1] == ("not read", "5 more, in summary.json")
    assert len(reading.lines()) == SHOWN + 1
    assert len(reading.summary()["notes"]["not read"]) == SHOWN + 5


def test_duplicates_are_found_by_the_inputs_of_the_model():
    train = Dataset.from_dict({"input_ids": [[1, 2], [3], [1, 2, 3]], "labels": [0, 1, 0]})
    other = Dataset.from_dict({"input_ids": [[4], [3], [1], [2, 3], [1, 2]], "labels": [0, 0, 0, 0, 0]})
    assert duplicates_note(train, other) == "2 of 5 validation examples are also training examples"
    assert duplicates_note(train, train.select([2])) == "all 1 validation example are also training examples"
    assert duplicates_note(train, other.select([0, 2, 3])) is None
    assert duplicates_note(train, other, truncated=True).endswith("examples, compared after truncation")
    empty = Dataset.from_dict(
        {"input_ids": [None, [], None]}, features=train.select_columns("input_ids").features
    )
    few, some = empty.select([0, 1]), concatenate_datasets([train.select_columns("input_ids"), empty])
    assert duplicates_note(some, few) == "all 2 validation examples are also training examples"


def test_of_images_only_those_of_equal_size_are_read_for_duplicates(monkeypatch):
    sizes = {"a": 1, "b": 2, "c": 3, "d": 2, "e": 4, "f": 2}
    for name, size in sizes.items():
        Path(name).write_bytes((b"x" if name in "bd" else name.encode()) * size)
    read, digest = [], fingerprint.digest_of_file
    monkeypatch.setattr(
        fingerprint, "digest_of_file", lambda **file: read.append(file["path"]) or digest(**file)
    )
    train, other = (
        Dataset.from_dict({"image": [*names]}).cast_column("image", Image()) for names in ("abc", "def")
    )
    assert duplicates_note(train, other) == "1 of 3 validation examples are also training examples"
    assert sorted(read) == ["b", "d", "f"]


def test_lost_tokens_are_those_beyond_the_most():
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_path())
    texts = [["a b", "a b c", "a b c d e"], ["x", "x", "x"]]
    found = tokenizer(*texts, truncation=True, max_length=7)
    assert tokens_lost(tokenizer, texts, found, 7) == [0, 0, 2]
    for length, lost in ((5, [0, 0, 2]), (4, [0, 1, 3]), (2, [2, 3, 5])):
        found = tokenizer(texts[0], truncation=True, max_length=length)
        assert tokens_lost(None, texts[:1], found, length) == lost  # not tokenised again
    words = [text.split() for text in texts[0]]
    found = tokenizer(words, is_split_into_words=True, truncation=True, max_length=4)
    assert tokens_lost(None, [words], found, 4, is_split_into_words=True) == [0, 1, 3]


def test_tokens_of_a_slow_tokenizer_are_counted(tmp_path):
    import transformers

    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]))
    tokenizer = transformers.BertTokenizerLegacy(str(tmp_path / "vocab.txt"))
    texts = ["a b", "a b a b a"]
    found = tokenizer(texts, truncation=True, max_length=4)
    assert not tokenizer.is_fast
    assert tokens_lost(tokenizer, [texts], found, 4) == [0, 3]


def test_a_run_states_what_was_truncated_skipped_merged_and_ignored(start):
    TextClassification = load_recipe("text_classification").TextClassification
    rows = [{**row, "weight": 2} for row in ROWS]
    rows[3]["text"], rows[5]["text"] = "", "long " * 40
    jsonl("set/train_a.jsonl", rows)
    jsonl("set/train_b.jsonl", [{"text": f"more {i}", "label": ["odd", "even", 7][i % 3]} for i in range(6)])
    csv("set/validation.csv", [*ROWS[:2], {"text": "new", "label": "odd"}])
    flags = {"--data.train": "set", "--data.on_bad_row": "skip", "--output.dir": "out"}
    flags |= {"--train.max_windows": 1, "--data.max_length": 16}
    outcome = start(TextClassification, *(word for flag in flags.items() for word in flag))
    assert outcome.code == 0, outcome.err
    lines = [
        "read                  set/train_a.jsonl: 40 rows, training",
        "read                  set/train_b.jsonl: 6 rows, training",
        "read                  set/validation.csv: 3 rows, validation",
        "ignored               1 column that nothing uses: weight",
        "merged                column 'label' has 44 texts, 2 numbers; 1 and \"1\" are one value",
        "truncated             1 training row lost 26 tokens, by data.max_length 16",
        "duplicates            2 of 3 validation examples are also training examples, "
        "compared after truncation",
    ]
    plan = [
        line for line in outcome.out.splitlines() if line.split("  ")[0] in {one.split()[0] for one in lines}
    ]
    assert plan == lines
    assert "left out              1 row that cannot be used" in outcome.out
    recorded = [f"{name:<22}{text}" for name, text in summary("out")["reading"]["lines"]]
    assert recorded == lines
    report = Path("out/report.html").read_text()
    assert "1 training row lost 26 tokens" in report
    assert "left out: 1 row, the first: set/train_a.jsonl line 4" in report


@pytest.mark.parametrize(
    ("recipe", "rows", "flags", "expected"),
    [
        (
            "token_classification:TokenClassification",
            [{"tokens": ["a"] * n, "tags": ["X", "Y"] * (n // 2)} for n in [20] * 20],
            ["--train.best_metric", "accuracy"],
            ["18 training rows and 2 validation rows lost 280 tokens, 280 of them with a label"],
        ),
        (
            "seq2seq:Seq2Seq",
            [{"source": f"{i} " + "a " * 9, "target": f"{i} b b b b b b"} for i in range(20)],
            ["--data.max_target_length", 6],
            ["truncated", "source tokens", "labelled tokens", "data.max_target_length 6"],
        ),
        (
            "contrastive:Contrastive",
            [{"anchor": f"{i} a", "positive": f"{i} " + "b " * 9} for i in range(20)],
            [],
            ["truncated", "tokens of positive"],
        ),
        (
            "masked_lm:MaskedLM",
            [{"text": f"{i} " + "a " * 20} for i in range(20)],
            [],
            ["split", "18 training rows into 72 chunks"],
        ),
        (
            "question_answering:QuestionAnswering",
            [
                {
                    "question": "who",
                    "context": "word " * 12 + f"Ada {i}",
                    "answers": {"text": ["Ada", "Ada"], "answer_start": [60, 60]},
                    "title": "t",
                }
                for i in range(20)
            ],
            ["--data.doc_stride", 0, "--data.max_length", 12],
            [
                "split",
                "18 training rows into 36 parts",
                "18 training parts",
                "all answers but the first of 18",
                "title",
            ],
        ),
    ],
    ids=lambda value: value.partition(":")[0] if isinstance(value, str) else "",
)
def test_every_recipe_counts_what_is_beyond_max_length(tiny_bert, recipe, rows, flags, expected):
    module, name = recipe.split(":")
    write_rows("rows.jsonl", rows)
    settings = {"--model.name": tiny_bert, "--data.train": "rows.jsonl", "--data.max_length": 8}
    settings |= {"--batch.effective": 4}
    made = make_recipe(getattr(load_recipe(module), name), *with_defaults(flags, settings))
    made.datasets()
    lines = "\n".join(f"{name} {text}" for name, text in made.reading.lines())
    assert all(one in lines for one in expected), lines


def test_a_description_that_names_files_changes_no_labels_and_no_file_is_dropped():
    rows = [{"text": f"t {i}", "label": ["01", "1"][i % 2]} for i in range(20)]
    csv("set/mine.csv", rows)
    jsonl("set/more.jsonl", rows)
    csv("set/others.csv", rows)
    files = "data_files: [{split: train, path: [mine.csv, more.jsonl]}]"
    Path("set/README.md").write_text(f"---\nconfigs:\n- config_name: default\n  {files}\n---\n")
    splits, lines = read("set")
    assert {*splits.train["label"]} == {"01", "1"}
    folder = Path("set").resolve()
    assert [text for name, text in lines if name == "read"] == [
        f"{folder}/mine.csv: 20 rows, training",
        f"{folder}/more.jsonl: 20 rows, training",
    ]
    assert any(text.startswith("set/others.csv: ") for name, text in lines if name == "not read")
    Path("set/README.md").write_text("---\nconfigs: [\n---\n")
    with pytest.raises(InputError, match="cannot be read"):
        read("set")
