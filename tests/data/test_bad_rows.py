"""data/bad_rows.py: rows that a task cannot learn from."""

import pytest
from datasets import Dataset

from gradacc_hf.data.bad_rows import check_rows
from gradacc_hf.data.columns import encode_labels, file_rows, list_lengths, select_rows, with_column
from gradacc_hf.errors import InputError


def is_bad(row):
    return "it is bad" if row["bad"] else None


def rows_of(*bad, number=10):
    """Rows that know their number in the file, of which those with these numbers are bad."""
    return Dataset.from_dict(
        {"number": list(range(1, number + 1)), "bad": [n in bad for n in range(1, number + 1)]}
    )


def test_the_first_bad_row_is_named_as_the_file_numbers_it():
    with pytest.raises(InputError) as caught:
        check_rows(rows_of(3, 5), is_bad, key="data.text_column", split="validation")
    cure = "correct it, or leave such rows out: --data.on_bad_row skip"
    first = "data.text_column: validation row 3: it is bad (the first of 2 bad rows)"
    assert str(caught.value) == f"{first}; {cure}"


@pytest.mark.parametrize("seed", range(4))
def test_the_first_row_of_the_file_is_named_in_any_order_and_any_part(seed):
    rows = rows_of(*range(3, 11)).shuffle(seed=seed, keep_in_memory=True)
    training, held_out = rows.select(range(6)), rows.select(range(6, 10))
    line = r"k: training row 3: it is bad \(the first of 8 bad rows\); correct it"
    with pytest.raises(InputError, match=line):
        check_rows(rows, is_bad, key="k")
    with pytest.raises(InputError, match=line):
        check_rows(training, is_bad, key="k", others=(held_out, None))


def test_of_labels_without_a_class_the_first_row_of_the_file_is_named():
    labels = [0, 1, 0, 1, *[None] * 8]
    rows = Dataset.from_dict({"label": labels}).shuffle(seed=1, keep_in_memory=True)
    with pytest.raises(InputError, match="row 5 is empty, the first of 8"):
        encode_labels(rows, rows, "label")
    rows = Dataset.from_dict({"label": [0, 1, 0, *[0.5] * 8]}).shuffle(seed=1, keep_in_memory=True)
    with pytest.raises(InputError, match=r"row 4: 0\.5"):
        encode_labels(rows, rows, "label")
    rows = Dataset.from_dict({"label": ["a", "b"]})
    others = Dataset.from_dict({"label": ["a", *"cdefgh"]}).shuffle(seed=1, keep_in_memory=True)
    with pytest.raises(InputError, match="label 'c' of validation row 2 is in no training row"):
        encode_labels(rows, others, "label")


def test_good_rows_are_the_data_set_itself():
    rows = rows_of()
    found, bad = check_rows(rows, is_bad, key="k", on_bad_row="skip")
    assert found is rows
    assert bad == []


@pytest.mark.parametrize("bad", [(1, 2), (9, 10), (1, 5, 10), (4,)], ids=str)
@pytest.mark.parametrize("seed", [None, 0, 1])
def test_skipped_rows_are_left_out_and_those_left_keep_their_numbers(bad, seed):
    rows = rows_of(*bad)
    if seed is not None:
        rows = rows.shuffle(seed=seed, keep_in_memory=True)
    kept, said = check_rows(rows, is_bad, key="k", on_bad_row="skip")
    assert sorted(said) == sorted(f"training row {number}: it is bad" for number in bad)
    assert kept["number"][:] == [number for number in rows["number"] if number not in bad]
    assert (file_rows(kept) + 1).tolist() == kept["number"][:]
    _, again = check_rows(kept, lambda row: "odd" * (row["number"] % 2) or None, key="k", on_bad_row="skip")
    assert again == [f"training row {number}: odd" for number in sorted(kept["number"]) if number % 2]


def test_a_held_out_part_and_a_mapped_one_are_numbered_as_the_file():
    held_out = rows_of(2, 9).shuffle(seed=3, keep_in_memory=True).select([0, 1, 2, 3, 4, 5])
    expected = [
        f"training row {number}: it is bad" for number in sorted(held_out["number"]) if number in (2, 9)
    ]
    assert expected
    assert check_rows(held_out, is_bad, key="k", on_bad_row="skip")[1] == expected
    mapped = held_out.map(lambda row: {"number": 0}).flatten_indices()
    numbers = file_rows(held_out)
    assert check_rows(mapped, is_bad, key="k", on_bad_row="skip", numbers=numbers)[1] == expected


def test_rows_of_many_blocks_are_all_seen():
    kept, bad = check_rows(rows_of(1000, 1001, 2500, number=2500), is_bad, key="k", on_bad_row="skip")
    assert len(kept) == 2497
    assert bad[-1] == "training row 2,500: it is bad"


@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
def test_a_data_set_of_which_no_row_is_left_is_refused(on_bad_row):
    with pytest.raises(InputError, match=r"row 1: it is bad"):
        check_rows(rows_of(1, 2, number=2), is_bad, key="k", on_bad_row=on_bad_row)


def test_where_all_rows_are_bad_the_format_that_they_look_like_is_named():
    chats = [[{"role": "user", "content": "hi"}]]
    for columns, name in (
        ({"instruction": ["a", "b"], "output": ["c", "d"]}, "Alpaca"),
        ({"chat": chats * 2}, "chats in column 'chat'"),
    ):
        rows = Dataset.from_dict({**columns, "bad": [True, True]})
        with pytest.raises(InputError) as caught:
            check_rows(rows, is_bad, key="k")
        cure = "correct it, or leave such rows out: --data.on_bad_row skip"
        more = f"(all 2 rows are bad; they look like {name})"
        assert str(caught.value) == f"k: training row 1: it is bad {more}; {cure}"
        with pytest.raises(InputError) as caught:
            check_rows(rows, is_bad, key="k", on_bad_row="skip")
        more = f"they look like {name} (training row 1: it is bad, …)"
        assert str(caught.value) == f"k: none of the 2 training rows can be used; {more}; give others"


def test_selected_rows_take_new_columns_and_are_told_apart():
    rows = rows_of()
    some, others = select_rows(rows, [2, 3, 4]), select_rows(rows, [3, 4, 5])
    assert some._fingerprint != others._fingerprint
    wider = with_column(some, "twice", 2 * (file_rows(some) + 1))
    assert wider["twice"][:] == [6, 8, 10]
    assert wider.map(lambda row: {"same": row["twice"] == 2 * row["number"]})["same"][:] == [True] * 3


def test_list_lengths_are_in_the_order_of_the_rows():
    rows = Dataset.from_dict({"tokens": [[1] * n for n in (3, 0, 2, 5)]}).select([3, 0, 1, 2])
    assert list_lengths(rows, "tokens").tolist() == [5, 3, 0, 2]
    assert list_lengths(rows.select([2, 1]), "tokens").tolist() == [0, 3]
    assert list_lengths(rows.to_list(), "tokens").tolist() == [5, 3, 0, 2]
