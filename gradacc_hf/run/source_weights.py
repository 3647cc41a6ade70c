"""The weights that a merged or exported model was written from: `source.json` in the model's folder.

`gradacc continue` and `gradacc merge` change the weights that an exported model was written from.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from gradacc_hf.errors import refuse

FILE = "source.json"


def write_source(folder: Path, run: Path, which: str) -> None:
    """Write the source of a model that is written to `folder`: the "best" or the "last" model of a run."""
    found = {"model": which, "window": _window(run, which), "sha256": _sha256(run / which)}
    (folder / FILE).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def refuse_existing(folder: Path, run: Path, which: str, command: str) -> None:
    """Raise InputError if the folder exists. The message states whether it holds the weights of the model.

    Args:
        folder: the folder that `command` writes.
        run: the folder of the run.
        which: "best" or "last".
        command: the command line that writes the folder, for the message.
    """
    if not folder.exists():
        return
    source = _read(folder / FILE)
    if source.get("sha256", same := _sha256(run / which)) == same:
        refuse(str(folder), "it exists", "move it, or use it")
    after = f" after window {source['window']:,}" if isinstance(source.get("window"), int) else ""
    model = "last" if source.get("model") == "last" else "best"
    found = f"it holds the {model} model{after}, and {run / which} has other weights"
    refuse(str(folder), found, f"move it, and run {command} again")


def _sha256(folder: Path) -> str:
    """Return the hash of the names and contents of the weights in a folder."""
    found = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            found.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return found.hexdigest()


def _window(run: Path, which: str) -> Any:
    """Return the window after which a model was saved; None if the run has not ended."""
    metrics = _read(run / "summary.json").get({"best": "best", "last": "eval"}[which])
    return (metrics or {}).get("window")


def _read(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file; an empty one if there is none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
