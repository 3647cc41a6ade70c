"""data/tagged_text.py: CoNLL files and two-column files → a row for each sentence, and the line of each."""

import gzip

import pytest

from gradacc_hf.data.files import Form
from gradacc_hf.data.loading import load_data
from gradacc_hf.data.places import places
from gradacc_hf.errors import InputError

DOCUMENT = (
    "-DOCSTART- -X- -X- O\n\nAda NNP B-NP B-PER\nsang VBD B-VP O\n\n\nRome NNP B-NP B-LOC\nburns VBZ B-VP O\n"
)


def read(given, columns=("tokens", "tags"), **form):
    return load_data(str(given), validation_fraction=0.5, seed=0, form=Form(word_columns=columns, **form))


def rows_of(splits):
    """(tokens, tags) of the rows, in the order of the file."""
    rows = [*splits.train, *splits.validation]
    return sorted(tuple(row.values())[:2] for row in rows)


@pytest.mark.parametrize(
    ("columns", "tags", "shown"),
    [
        (("tokens", "tags"), "B-PER O", "tokens in column 1 (word), tags in column 4 (ner) of 4"),
        (("tokens", "2"), "NNP VBD", "tokens in column 1 (word), tags in column 2 (pos) of 4"),
        (("tokens", "Chunk"), "B-NP B-VP", "tokens in column 1 (word), tags in column 3 (chunk) of 4"),
    ],
)
def test_the_column_of_the_tags_is_found_or_named(tmp_path, columns, tags, shown):
    (tmp_path / "a.txt").write_text(DOCUMENT)
    splits = read(tmp_path / "a.txt", columns)
    assert rows_of(splits)[0] == (["Ada", "sang"], tags.split())
    assert shown in str(splits.reading.files[0])
    for wrong in ("5", "0", "lemma"):
        with pytest.raises(
            InputError, match=r"data.tags_column: .* has no column .*1 to 4, or word, pos, chunk"
        ):
            read(tmp_path / "a.txt", ("tokens", wrong))


def test_columns_of_conll_u_have_names_and_a_dash_is_no_label(tmp_path):
    lines = [
        "1-2\tdu\t_\t_\t_\t_\t_\t_\t_\t_",
        "1\tde\tde\tADP\tP\t_\t3\tcase\t_\t_",
        "# x",
        "2\tle\tle\t_\tD\t_\t3\tdet\t_\t_",
    ]
    (tmp_path / "a.conllu").write_text("# global\n" + "\n".join(lines) + "\n\n" + "\n".join(lines[1:]) + "\n")
    assert rows_of(read(tmp_path / "a.conllu")) == [(["de", "le"], ["ADP", "-100"])] * 2
    assert rows_of(read(tmp_path / "a.conllu", ("tokens", "XPOS")))[0][1] == ["P", "D"]
    assert rows_of(read(tmp_path / "a.conllu", ("3", "deprel")))[0] == (["de", "le"], ["case", "det"])


def test_a_token_may_be_a_number_sign_or_hold_spaces(tmp_path):
    (tmp_path / "a.tsv").write_text("# id 3\nNew York\tLOC\n#\tO\n\n# id 4\n \t\nAda\tPER\n")
    assert rows_of(read(tmp_path / "a.tsv")) == [(["Ada"], ["PER"]), (["New York", "#"], ["LOC", "O"])]


def test_comments_with_as_many_fields_as_columns_are_comments(tmp_path):
    row = "robert _ _ B-PER\n# _ _ O\n"
    (tmp_path / "a.conll").write_text(f"# id 5239d808\tdomain=en\n{row}\n# id cdf9c1cf\tdomain=en\n{row}")
    assert rows_of(read(tmp_path / "a.conll")) == [(["robert", "#"], ["B-PER", "O"])] * 2
    (tmp_path / "a.conll").write_text(f"# _ _ O\n{row}\n{row}")
    assert rows_of(read(tmp_path / "a.conll"))[0] == (["#", "robert", "#"], ["O", "B-PER", "O"])


def test_a_broken_line_is_a_fault_of_the_sentence_with_the_line(tmp_path):
    path = tmp_path / "a.conll"
    path.write_text(DOCUMENT + "\nsolo X\n\nno tag B-NP \n\n")
    splits = read(path)
    found = {row["__fault"]: row["tokens"] for row in (*splits.train, *splits.validation) if row["__fault"]}
    assert found == {
        "line 10 has 2 columns, other lines have 4": [],
        "line 12 has 3 columns, other lines have 4": [],
    }
    assert places(splits.train, range(4)) == [f"{path} line {line}" for line in (3, 7, 10, 12)]
    path.write_text("Ada\tO\nsang\t\n\nRome\tO\n")
    faults = [row["__fault"] for split in (read(path).train, read(path).validation) for row in split]
    assert "line 2 has no tag" in faults
    path.write_text("Ada\nsang\n")
    with pytest.raises(InputError, match=r"a.conll line 1 has one column; a line has a token and a tag"):
        read(path)


def test_a_folder_has_splits_and_files_may_be_compressed_or_in_another_encoding(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "README.txt").write_text("About the corpus")
    (folder / "train.txt").write_text(DOCUMENT)
    (folder / "valid.txt").write_text("Käse NN B-NP O\n", encoding="utf-16")
    with gzip.open(folder / "test.txt.gz", "wt") as file:
        file.write("never NN B-NP O\n")
    splits = read(folder)
    assert (len(splits.train), splits.validation[0]["tokens"]) == (2, ["Käse"])
    assert "encoding utf-16" in str(splits.reading.files[1])
    assert "README.txt" in str(splits.reading.notes["not read"])
    several = read(f"{folder}/train.txt,{folder}/valid.txt")
    assert len(several.train) + len(several.validation) == 3
    with pytest.raises(InputError, match=r"no data file in"):  # for other recipes
        load_data(str(folder), validation_fraction=0.5, seed=0)
