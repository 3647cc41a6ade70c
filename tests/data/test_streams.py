"""Rows of a stream: in the order of the files, from any position on, without what is before it."""

import codecs
import gzip
import json
import random
from itertools import chain
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gradacc_hf.data.reading import Reading
from gradacc_hf.data.streams import open_streams
from gradacc_hf.errors import InputError

ROWS = [{"text": f"row {number} ü", "label": number % 3} for number in range(50)]


def json_lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def write_json_lines(folder):
    (folder / "a.jsonl").write_bytes(codecs.BOM_UTF8 + json_lines(ROWS[:1]) + b"\n" + json_lines(ROWS[1:20]))
    (folder / "aa.jsonl").touch()
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(json_lines(ROWS[20:])))
    return str(folder)


def write_parquet(folder):
    table = pa.Table.from_pylist(ROWS)
    for name, rows in (("a", table[:20]), ("aa", table[:0]), ("b", table[20:])):
        pq.write_table(rows, folder / f"{name}.parquet", row_group_size=8)
    return str(folder)


def opened(given, **settings):
    return open_streams(str(given), "data.train", Reading(), **settings)["train"]


def rows_of(chunks):
    return list(chain.from_iterable(chunk.rows() for chunk in chunks))


@pytest.mark.parametrize("write", [write_json_lines, write_parquet])
def test_reading_goes_on_at_every_position_with_rows_and_places(tmp_path, write):
    given = write(tmp_path)
    chunks = list(opened(given).chunks({}, 7))
    found = rows_of(chunks)
    assert [row for _, row, _ in found] == ROWS
    first, unit = ("a.jsonl", "line 1") if write is write_json_lines else ("a.parquet", "row 1")
    assert found[0][0] == f"{tmp_path / first} {unit}"
    assert found[1][0].endswith(("line 3", "row 2"))
    assert found[20][0].endswith(("b.jsonl.gz line 1", "b.parquet row 1"))
    done = 0
    for chunk in chunks:
        assert rows_of(opened(given).chunks(json.loads(json.dumps(chunk.start)), 5)) == found[done:]
        done += len(chunk.content)
    head, stop = opened(given).take(33, {})
    assert rows_of(head) == found[:33]
    assert rows_of(opened(given).chunks(stop)) == found[33:]
    assert opened(given).take(99, stop)[0] != []
    assert rows_of(opened(given).take(99, stop)[0]) == found[33:]


def test_what_is_before_the_position_is_not_read_again(tmp_path):
    """It is overwritten, but for two row groups before the position, which `datasets` skips."""
    lines = tmp_path / "a.jsonl"
    lines.write_bytes(json_lines(ROWS))
    chunks = list(opened(lines).chunks({}, 10))
    lines.write_bytes(b"\0" * chunks[3].start["offset"] + lines.read_bytes()[chunks[3].start["offset"] :])
    assert [row for _, row, _ in rows_of(opened(lines).chunks(chunks[3].start))] == ROWS[30:]

    table = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), table, row_group_size=10)
    chunks = list(opened(table).chunks({}, 10))
    group = pq.ParquetFile(table).metadata.row_group(0)
    end = group.column(1).data_page_offset + group.column(1).total_compressed_size
    content = table.read_bytes()
    table.write_bytes(content[:4] + b"\xff" * (end - 50 - 4) + content[end - 50 :])
    assert [row for _, row, _ in rows_of(opened(table).chunks(chunks[3].start))] == ROWS[30:]


def test_a_line_that_is_no_row_is_named(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "a"}\n\n{"text": \n[1]\n{"text": "\xfc"}\n{"text": NaN}\n')
    found = [
        (place.removeprefix(f"{file} "), row, problem)
        for place, row, problem in rows_of(opened(file).chunks({}))
    ]
    assert found[0] == ("line 1", {"text": "a"}, None)
    assert found[-1] == ("line 6", {"text": None}, None)
    assert [(place, problem[:9]) for place, _, problem in found[1:-1]] == [
        ("line 3", "not JSON:"),
        ("line 4", "not an ob"),
        ("line 5", "byte 11 i"),
    ]
    latin = rows_of(opened(file, encoding="cp1252").chunks({}))
    assert latin[3][1] == {"text": "ü"}


def test_a_folder_has_splits_and_other_files_are_noted(tmp_path):
    for name in ("train-1.jsonl", "train-2.jsonl", "dev.jsonl"):
        (tmp_path / name).write_bytes(json_lines(ROWS[:3]))
    (tmp_path / "notes.csv").write_text("a,b\n1,2\n")
    reading = Reading()
    found = open_streams(str(tmp_path), "data.train", reading)
    assert {split: len(rows_of(rows.chunks({}))) for split, rows in found.items()} == {
        "train": 6,
        "validation": 3,
    }
    assert "notes.csv" in reading.notes["not read"][0]
    assert found["train"].sizes().keys() == {"train-1.jsonl", "train-2.jsonl"}


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("a.csv", "text\na\n", "a.csv cannot be streamed; data.streaming reads JSON lines"),
        ("a.json", '[{"text": "a"}]', "a.json is one list, which is read whole; write one object a line"),
        ("embedded:functions", None, "'embedded:functions' cannot be streamed"),
        ("gone.jsonl", None, "no file 'gone.jsonl'"),
    ],
)
def test_what_cannot_be_streamed_is_refused_in_one_line(tmp_path, monkeypatch, name, content, line):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path(name).write_text(content)
    with pytest.raises(InputError) as raised:
        opened(name)
    assert str(raised.value).startswith("data.train: ")
    assert line in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_damaged_file_is_named_with_the_line_before(tmp_path):
    whole = gzip.compress(random.Random(0).randbytes(200_000).hex("\n", 20).encode())
    path = tmp_path / "a.jsonl.gz"
    for content, place in (
        (whole[:-90_000], r"after line \d,\d+: it cannot be"),
        (whole[:8], "it cannot be"),
    ):
        path.write_bytes(content)
        with pytest.raises(InputError, match=f"{path}: {place} read: Compressed file ended before"):
            list(opened(path).chunks({}))
    path = path.rename(tmp_path / "a.jsonl")
    with pytest.raises(InputError, match=r"it begins as a .gz file; rename it to a.jsonl.gz"):
        opened(path)


def test_an_encoding_without_line_ends_of_one_byte_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n', encoding="utf-16")
    with pytest.raises(InputError, match=r"data\.encoding: found utf-16"):
        opened(tmp_path / "a.jsonl", encoding="utf-16")
