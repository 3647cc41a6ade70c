"""Instructions to write the function that a docstring describes, and answers."""

from datasets import Dataset

from gradacc_hf.embedded.stdlib import documented_functions

LONGEST_DOCSTRING, LONGEST_SOURCE = 120, 240  # characters, so that a run on a CPU is short
VALIDATION_ROWS = 64  # rows


def instructions() -> tuple[Dataset, Dataset]:
    """Return (train, validation) of `messages`: a request for a function, and its source as the answer."""
    train, validation = documented_functions()
    return _short(train), _short(validation).select(range(VALIDATION_ROWS))


def _short(rows: Dataset) -> Dataset:
    chats = [
        _chat(row["name"].rpartition(".")[2], row["text"], row["source"])
        for row in rows.shuffle(seed=0).to_list()  # rows are sorted by module
        if len(row["text"]) <= LONGEST_DOCSTRING and len(row["source"]) <= LONGEST_SOURCE
    ]
    return Dataset.from_dict({"messages": chats})


def _chat(name: str, docstring: str, source: str) -> list[dict[str, str]]:
    prompt = f"Write the Python function `{name}`. {docstring}"
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": source}]
