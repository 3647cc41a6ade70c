"""data/readers.py: every kind of data file, as other programs write it, and the lines about broken ones."""

import bz2
import gzip
import json
import lzma
import random
from pathlib import Path

import datasets.config
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from gradacc_hf.data import files
from gradacc_hf.data.columns import require_column
from gradacc_hf.data.files import Form, find_encoding
from gradacc_hf.data.loading import load_data
from gradacc_hf.data.looks_like import looks_like
from gradacc_hf.data.places import places
from gradacc_hf.data.tables import find_separator
from gradacc_hf.errors import InputError

README = (Path(__file__).parents[2] / "recipes" / "README.md").read_text()
ROWS = [
    {"text": "a, b; c", "label": "x"},
    {"text": 'say "hi"', "label": "NA"},
    {"text": "two\nlines", "label": "007"},
    {"text": "null", "label": "1e3"},
    {"text": "über 2020-01-01", "label": "True"},
]
FORMATS = README.split("## Formats")[1].split("\n##")[0]
JSONL = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)


def load(train, **form):
    """The training rows as they are in the files, and what the plan states about the files."""
    splits = load_data(train, train, validation_fraction=0.1, seed=0, form=Form(**form))
    return splits.train.to_list(), [str(file) for file in splits.reading.files if file.use == "training"]


def refusal(function, *args, **kwargs):
    with pytest.raises(InputError) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Tables


@pytest.mark.parametrize(
    ("name", "separator", "encoding", "stated"),
    [
        ("a.csv", ",", "utf-8", ""),
        ("a.csv", ";", "utf-8-sig", " (separator ;)"),
        ("a.csv", "\t", "utf-16", " (separator tab, encoding utf-16)"),
        ("a.csv", "|", "utf-16-le", " (separator |, encoding utf-16-le)"),
        ("a.csv", ",", "utf-16-be", " (encoding utf-16-be)"),
        ("a.csv", ";", "cp1252", " (separator ;, encoding cp1252)"),
        ("a.tsv", "\t", "latin-1", " (separator tab, encoding cp1252)"),
        ("a.tsv", ",", "utf-8", ""),
    ],
)
def test_a_table_is_read_as_a_spreadsheet_writes_it(name, separator, encoding, stated):
    pd.DataFrame(ROWS).to_csv(name, sep=separator, encoding=encoding, index=False)
    assert load(name) == (ROWS, [f"{name}: 5 rows, training{stated}"])


@pytest.mark.parametrize(
    ("text", "separator"),
    [
        ('text,label\n"a, b, c",x\n"d, e",y\n', ","),
        ('text,label\n"a; b; c",x\n"d; e",y\n', ","),
        ("text,label\na; b; c,x\nd; e,y\n", ","),
        ("text;label\na, b;x\nc, d;y\n", ";"),
        ("id|name, title;text\n1|a, b;c\n2|d; e;f g\n", "|"),
        ("text; or note,label\na; b,x\nc; d; e,y\n", ","),
        ("text\nhello, world\nhello\n", "\x1f"),
        ("text\nhello; world, again\nhello\n", "\x1f"),
        ("text\nhello\nworld\n", ","),
        ('text\n"a, b"\n"c"\n', ","),
        ("text\ta\n1, 2\tb\n3, 4\tc\n", "\t"),
        ('text;label\n"two\nlines; here";x\nb;y\n', ";"),
    ],
    ids=repr,
)
def test_the_separator_divides_all_rows_like_the_header(text, separator):
    Path("a.csv").write_text(text)
    assert find_separator(Path("a.csv"), "utf-8") == separator


def test_one_column_of_texts_with_commas_is_one_column():
    Path("a.csv").write_text('text\nhello, world\n"quoted, too"\nhello\n')
    rows = [{"text": text} for text in ("hello, world", "quoted, too", "hello")]
    assert load("a.csv") == (rows, ["a.csv: 3 rows, training (separator none)"])


@pytest.mark.parametrize(
    "texts",
    [['"hello there', "b", 'say" now'], ['say "hi"', '"open', "c"]],
    ids=["two quotes", "an open quote"],
)
def test_quotes_that_are_text_merge_no_lines(texts):
    rows = [{"text": text, "label": "x"} for text in texts]
    Path("a.tsv").write_text("text\tlabel\n" + "".join(f"{text}\tx\n" for text in texts))
    assert load("a.tsv") == (rows, ["a.tsv: 3 rows, training (separator tab, quotes as text)"])
    assert places(load_data("a.tsv", "a.tsv", validation_fraction=0.1, seed=0).train, [2]) == ["a.tsv line 4"]


def test_the_settings_overrule_what_is_found():
    Path("a.csv").write_bytes("text,more;label\na,b;õ\n".encode("cp1250", "replace").replace(b"?", b"\xf5"))
    assert load("a.csv", separator="semicolon", encoding="cp1250")[0] == [{"text,more": "a,b", "label": "ő"}]
    rows, stated = load("a.csv", separator="\\t", encoding="latin-1")
    assert (rows, stated) == (
        [{"text,more;label": "a,b;õ"}],
        ["a.csv: 1 row, training (separator tab, encoding latin-1)"],
    )
    line = "a.csv is not UTF-8: line 2, byte 20; save it as UTF-8, or set data.encoding to its encoding"
    assert refusal(load, "a.csv", encoding="utf-8") == f"data.train: {line}"


SENTENCES = {
    "cp1252": "C'était « très » bon… 20 € – Größe, señor, São Paulo, være; l\u2019île",
    "cp1250": "Zażółć gęślą jaźń. Příliš žluťoučký kůň úpěl.",
    "cp1251": "Очень хороший фильм, рекомендую",
    "koi8-r": "Очень хороший фильм, рекомендую",
    "cp1253": "Πολύ καλή ταινία, τη συνιστώ",
    "cp1254": "Çok güzel bir film, ışık şahane, öğrenci değil, teşekkürler",
    "cp1255": "סרט טוב מאוד, ממליץ בחום",
    "cp1256": "فيلم جيد جدا",
}


@pytest.mark.parametrize("page", SENTENCES)
def test_the_code_page_is_one_in_which_the_words_have_the_letters_of_a_language(page):
    Path("a.csv").write_bytes(f"text,label\n{SENTENCES[page]},1\nplain,2\n".encode(page))
    assert find_encoding(Path("a.csv"), "data.train") == page


@pytest.mark.parametrize(
    "content",
    [
        "とても良い映画です".encode("shift_jis"),
        "아주 좋은 영화입니다".encode("euc_kr"),
        b"ok \xc3\xa9 \xe9t\xe9",
    ],
    ids=["Japanese", "Korean", "UTF-8 and others"],
)
def test_an_encoding_that_is_not_found_is_refused(content):
    Path("a.csv").write_bytes(b"text\n" + content + b"\n")
    cure = "save it as UTF-8, or set data.encoding to its encoding, such as cp1252 or shift_jis"
    assert refusal(load, "a.csv").startswith("data.train: a.csv is not UTF-8: line 2, byte ")
    assert refusal(load, "a.csv").endswith(f"; {cure}")


def test_the_first_letter_beyond_ascii_may_be_late():
    start = "text,label\n" + "a plain row,1\n" * 80_000
    Path("a.csv").write_text(f"{start}é,2\n")
    assert len(start) > files.BLOCK
    assert find_encoding(Path("a.csv"), "data.train") == files.UTF8
    Path("a.csv").write_text(f"{start}étés,2\n", encoding="cp1252")
    assert find_encoding(Path("a.csv"), "data.train") == "cp1252"


# Compression


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("kind", [".csv", ".jsonl"])
def test_compressed_text_is_read(suffix, kind):
    pd.DataFrame(ROWS).to_csv("b.csv", index=False, sep=";", encoding="cp1252")
    content = Path("b.csv").read_bytes() if kind == ".csv" else JSONL.encode()
    name = f"a{kind}{suffix}"
    if suffix == ".zst":
        import zstandard

        Path(name).write_bytes(zstandard.compress(content))
    else:
        compress = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}[suffix]
        Path(name).write_bytes(compress(content))
    stated = " (separator ;, encoding cp1252)" if kind == ".csv" else ""
    assert load(name) == (ROWS, [f"{name}: 5 rows, training{stated}"])


def test_a_library_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(files, "find_spec", lambda name: None)
    for name, library in (("a.jsonl.zst", "zstandard"), ("a.xlsx", "openpyxl")):
        Path(name).touch()
        line = f"data.train: {name} needs the library {library}; pip install {library}"
        assert refusal(load, name) == line


def test_a_damaged_compressed_file_is_one_line():
    Path("a.csv.gz").write_bytes(gzip.compress(random.Random(0).randbytes(9_000))[:5_000])
    assert refusal(load, "a.csv.gz").startswith(
        "data.train: cannot read a.csv.gz: Compressed file ended before"
    )
    Path("a.jsonl.zst").write_bytes(b"no frame of zstandard")
    assert refusal(load, "a.jsonl.zst").startswith("data.train: cannot read a.jsonl.zst: zstd ")
    Path("a.xlsx").write_bytes(b"no workbook")
    assert refusal(load, "a.xlsx").startswith("data.train: a.xlsx cannot be read: ")
    Path("a.jsonl.gz").write_text(JSONL)
    assert refusal(load, "a.jsonl.gz").startswith("data.train: cannot read a.jsonl.gz: Not a gzipped file")


# JSON


@pytest.mark.parametrize(
    ("name", "text", "stated"),
    [
        ("a.json", json.dumps(ROWS, indent=1), ""),
        ("a.json", json.dumps({"version": 1, "data": ROWS}), " (rows under 'data')"),
        ("a.json", json.dumps({"data": ROWS, "tags": ["x"], "none": []}, indent=2), " (rows under 'data')"),
        ("a.json", JSONL, ""),
        ("a.json", f"\n{JSONL}", ""),
        ("a.jsonl", "\ufeff" + JSONL.replace("\n", "\r\n\r\n"), ""),
    ],
    ids=["list", "wrapped", "wrapped, indented", "lines", "a blank line first", "BOM, blank lines"],
)
def test_json_in_every_layout_is_read(name, text, stated):
    Path(name).write_text(text, encoding="utf-8", newline="")
    assert load(name) == (ROWS, [f"{name}: 5 rows, training{stated}"])


def test_a_data_frame_as_json_is_read():
    pd.DataFrame(ROWS).to_json("a.json")
    assert load("a.json") == (ROWS, ["a.json: 5 rows, training (rows under the name of each column)"])


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "cp1252"])
def test_json_in_another_encoding_is_read(encoding):
    Path("a.jsonl").write_text(JSONL, encoding=encoding)
    assert load("a.jsonl") == (ROWS, [f"a.jsonl: 5 rows, training (encoding {encoding})"])
    Path("b.json").write_text(json.dumps(ROWS, ensure_ascii=False), encoding=encoding)
    assert load("b.json")[0] == ROWS


def test_lists_named_as_splits_are_splits():
    Path("a.json").write_text(json.dumps({"train": ROWS, "test": ROWS[:2], "version": 2}))
    splits = load_data("a.json", validation_fraction=0.1, seed=0)
    assert (splits.train.to_list(), splits.validation.to_list()) == (ROWS, ROWS[:2])
    assert [str(file) for file in splits.reading.files] == [
        "a.json: 5 rows, training (rows under 'train')",
        "a.json: 2 rows, validation (rows under 'test')",
    ]


def test_of_several_lists_one_is_chosen_by_a_setting():
    Path("a.json").write_text(json.dumps({"rows": ROWS, "labels": [{"id": 1}]}))
    line = (
        "data.train: a.json has several lists of objects: 'rows' (5), 'labels' (1); choose one, "
        "as --data.rows_key rows"
    )
    assert refusal(load, "a.json") == line
    assert load("a.json", rows_key="rows") == (ROWS, ["a.json: 5 rows, training (rows under 'rows')"])
    line = "a.json has no list of objects under 'row'; found the keys rows, labels; allowed: rows, labels"
    assert refusal(load, "a.json", rows_key="row") == f"data.rows_key: {line}"
    Path("b.jsonl").write_text(JSONL)
    assert load("b.jsonl", rows_key="rows")[0] == ROWS


def test_a_column_that_nothing_uses_refuses_no_file():
    metas = [1, "two", {"a": {"b": [1]}}, {"a": "c", "d": 2.5}, [1, "x"], None, True]
    rows = [{"text": f"t {i}", "label": "ab"[i % 2], "meta": metas[i % 7]} for i in range(21)]
    Path("a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert load("a.jsonl")[0] == rows


def test_half_of_a_truncated_emoji_refuses_no_file():
    rows = [{"text": f"t {i}", "note": "\ud83d" if i == 2 else "\U0001f600"} for i in range(4)]
    Path("a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert load("a.jsonl")[0] == [*rows[:2], {"text": "t 2", "note": "?"}, rows[3]]


def test_columns_of_parquet_that_datasets_cannot_read_are_left_out():
    columns = {name: [row[name] for row in ROWS] for name in ("text", "label")}
    maps = pa.array([[("a", 1)]] * 5, pa.map_(pa.string(), pa.int64()))
    pq.write_table(pa.table({**columns, "meta": maps}), "a.parquet")
    assert load("a.parquet") == (ROWS, ["a.parquet: 5 rows, training (without meta)"])


# Other files


def test_arrow_files_and_saved_data_sets_are_read():
    rows = Dataset.from_list(ROWS)
    DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk("saved")
    splits = load_data("saved", validation_fraction=0.1, seed=0)
    assert (splits.train.to_list(), splits.validation.to_list()) == (ROWS, ROWS[1:2])
    rows.save_to_disk("one")
    assert load("one")[0] == ROWS
    (file,) = Path("one").glob("*.arrow")
    assert load(str(file)) == (ROWS, [f"{file}: 5 rows, training"])
    state = json.loads(Path("one/state.json").read_text())
    state["_data_files"][0]["filename"] = "../saved/train/data-00000-of-00001.arrow"
    Path("one/state.json").write_text(json.dumps(state))
    assert "one/state.json names '../saved/train/" in refusal(load, "one")


def test_a_sheet_of_an_excel_file_is_read():
    others = [{"text": 1, "label": 2.5}, {"text": "NA", "label": None}]
    with pd.ExcelWriter("a.xlsx") as book:
        pd.DataFrame(ROWS).to_excel(book, sheet_name="first one", index=False)
        pd.DataFrame(others).to_excel(book, sheet_name="other", index=False)
    assert load("a.xlsx") == (ROWS, ["a.xlsx: 5 rows, training (sheet 'first one', other sheets: other)"])
    splits = load_data("a.xlsx", "a.xlsx", validation_fraction=0.1, seed=0)
    assert places(splits.train, [0, 4]) == ["a.xlsx line 2", "a.xlsx line 6"]
    found = [{"text": "1", "label": "2.5"}, {"text": "NA", "label": None}]
    assert load("a.xlsx", sheet="other") == (found, ["a.xlsx: 2 rows, training (sheet 'other')"])
    assert (
        refusal(load, "a.xlsx", sheet="x") == "data.sheet: a.xlsx has no sheet 'x'; allowed: first one, other"
    )
    with pytest.raises(InputError) as caught:
        require_column(splits.train, "body", "data.text_column")
    assert str(caught.value).endswith("one of them, or set data.sheet to a sheet that was not read: other")


def test_an_empty_sheet_is_named_with_the_others():
    with pd.ExcelWriter("a.xlsx") as book:
        pd.DataFrame({"notes": []}).to_excel(book, sheet_name="Notes", index=False)
        pd.DataFrame(ROWS).to_excel(book, sheet_name="the data", index=False)
    assert refusal(load, "a.xlsx") == (
        "data.train: a.xlsx: sheet 'Notes' has no rows; other sheets: the data; "
        "to read another: --data.sheet 'the data'"
    )


def test_without_openpyxl_an_excel_file_is_refused(monkeypatch):
    monkeypatch.setattr(files, "find_spec", lambda library: None)
    Path("a.xlsx").touch()
    assert "pip install openpyxl" in refusal(load, "a.xlsx")


def test_every_example_of_the_page_of_formats_is_read():
    rows = [line.split(" | ") for line in FORMATS.split("\n") if line.startswith("| `.")]
    examples = [(cells[0].strip("|` "), cells[1].strip("`")) for cells in rows if "good" in cells[1]]
    assert len(examples) == 7
    for number, (suffix, text) in enumerate(examples):
        name = f"{number}{suffix}"
        Path(name).write_text(text.replace("⏎", "\n").replace("→", "\t") + "\n")
        assert load_data(name, name, validation_fraction=0.1, seed=0).train.to_list() == [
            {"text": "good; fine", "label": "yes"}
        ], name
    assert all(f"`{suffix}`" in FORMATS for suffix in (*files.BUILDERS, *files.COMPRESSED))


# Several files


def test_several_files_are_one_data_set_in_their_order():
    Path("s").mkdir()
    for number in (2, 0, 1):
        Path(f"s/{number}.jsonl").write_text(json.dumps(ROWS[number]) + "\n")
    pd.DataFrame(ROWS[3:]).to_csv("b.csv", index=False, sep=";")
    Path("s/notes.md").touch()
    Path("s/older").mkdir()
    stated = [*(f"s/{number}.jsonl: 1 row, training" for number in range(3))]
    assert load("s/*.jsonl") == (ROWS[:3], stated)
    assert load("s/*") == (ROWS[:3], stated)
    assert load("s/*.jsonl,b.csv") == (ROWS, [*stated, "b.csv: 2 rows, training (separator ;)"])
    assert load(["b.csv", "s/0.jsonl"])[0] == [*ROWS[3:], ROWS[0]]
    splits = load_data("s/*", "b.csv", validation_fraction=0.1, seed=0)
    kinds = f"allowed: {files.ALLOWED}"
    notes = [("not read", f"s/notes.md: {kinds}"), ("not read", "s/older: a folder")]
    assert splits.reading.lines()[-2:] == notes
    assert refusal(load, "s/*.txt") == f"data.train: no data file matches 's/*.txt'; {kinds}"
    assert refusal(load, "b.csv, c.csv") == "data.train: no file 'c.csv'; did you mean 'b.csv'?"
    assert refusal(load, "b.csv, s") == "data.train: 's' is a folder; name its files, such as s/*"
    Path("s/~$book.xlsx").touch()
    assert load("s/*") == (ROWS[:3], stated)
    Path("a,b.jsonl").write_text(JSONL)
    assert load("a,b.jsonl")[0] == ROWS


# Errors


OBJECTS = "one JSON object a line, or one list of objects"
FIELDS = "correct it, or set data.separator"
HEADER = "correct it, or give every column a name; one column of texts: --data.separator none"


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("a.csv", 'text;label\n"a\nb";x\nc;y;z\n', f"a.csv line 4: 3 values for 2 columns; {FIELDS}"),
        (
            "a.csv",
            'text,label\n"a\nb",x\n\n"c,y\n',
            f"a.csv line 5: a quote opens and does not close; {FIELDS}",
        ),
        ("a.csv", "text\na,b\nc,d\n", f"a.csv line 2: 2 values for 1 column; {HEADER}"),
        ("a.csv", "PK\x03\x04", "a.csv is not text: it begins as a .xlsx file; rename it to a.xlsx"),
        ("a.jsonl", '{"a": "b"}\n\n{"a": b}\n', f"a.jsonl line 3, column 7: Expecting value; {OBJECTS}"),
        ("a.jsonl", '{"text": "a"}\n[1]\n', f"a.jsonl line 2: not an object; {OBJECTS}"),
        ("a.json", '[{"a": "b"},\n {"a"}]', f"a.json line 2: Expecting ':' delimiter; {OBJECTS}"),
    ],
)
def test_the_line_of_a_broken_file_is_named(name, text, line):
    Path(name).write_text(text)
    assert refusal(load, name) == f"data.train: {line}"


def test_a_row_is_named_by_its_line_in_its_file():
    Path("a.csv").write_text('text,label\n\n"two\nlines",x\n  \nb,y\n"c\n\nd",\n')
    Path("b.jsonl").write_text('\n{"text": "e", "label": "x"}\n\n{"text": "f", "label": "y"}\n')
    Path("c.json").write_text(json.dumps(ROWS))
    splits = load_data("a.csv,b.jsonl,c.json", "a.csv", validation_fraction=0.1, seed=0)
    shuffled = splits.train.shuffle(seed=1, keep_in_memory=True).map(lambda row: {"label": row["text"]})
    expected = [
        "a.csv line 3",
        "a.csv line 6",
        "a.csv line 7",
        "b.jsonl line 2",
        "b.jsonl line 4",
        "c.json row 1",
    ]
    assert places(shuffled, range(6)) == expected
    splits.train.save_to_disk("saved")
    Path("b.jsonl").write_text("{}\n")  # no longer the file that was read
    assert places(shuffled, [3, 4]) == ["b.jsonl row 1", "b.jsonl row 2"]
    assert places(Dataset.from_list(ROWS), [6], "validation") == ["validation row 7"]


@pytest.mark.parametrize(
    ("columns", "name"),
    [
        (["conversations"], "ShareGPT"),
        (["text", "instruction", "input", "output"], "Alpaca"),
        (["title", "paragraphs"], "SQuAD as published"),
        (["messages"], "OpenAI messages"),
        (["text", "label"], None),
    ],
)
def test_a_missing_column_is_named_with_the_format_of_the_others(columns, name):
    assert looks_like(columns) == name
    rows = Dataset.from_dict({column: ["x"] for column in columns})
    found = f"no column 'body'; found {', '.join(columns)}" + (f" (it looks like {name})" if name else "")
    assert refusal(require_column, rows, "body", "k").startswith(f"k: {found}; ")


def test_chats_are_noticed_in_any_column():
    turns = [{"role": "user", "content": "a"}]
    assert looks_like(["chat"], [{"chat": turns}]) == "chats in column 'chat'"
    assert looks_like(["chat"], [{"chat": []}, {"chat": "a"}]) is None
