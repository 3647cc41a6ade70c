"""`--output.push_to_hub`: push a run's model with its card to the Hub.

Name, token and permissions are checked before the training. A push that fails after the training leaves the
run unchanged, and prints the command to push later. The token stays in huggingface_hub.
"""

import json
import os
import shlex
import sys
import threading
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import disable_progress_bars, validate_repo_id

from gradacc_hf.config.earlier_run import EarlierRun
from gradacc_hf.embedded import origin
from gradacc_hf.errors import one_line, refuse
from gradacc_hf.utils.redaction import redact

KEY = "output.push_to_hub"
ADAPTER = "adapter_config.json"
LATER = "push later instead: hf upload NAME RUN/best ."


def check_push(name: str, seconds: float = 15) -> str:
    """Return the full name, USER/NAME, of a repository that this user may write. Raise InputError.

    Only the first process sends a request to the Hub, for at most `seconds`. The others return `name`.
    """
    try:
        validate_repo_id(name)
    except HFValidationError:
        refuse(KEY, f"found {name!r}", "allowed is NAME or USER/NAME, of letters, digits, -, _ and .")
    if constants.is_offline_mode():
        refuse(KEY, "the Hub client is offline (HF_HUB_OFFLINE is set)", f"unset it, or {LATER}")
    if get_token() is None:
        refuse(KEY, "found no token of the Hub", f"hf auth login, or {LATER}")
    if int(os.environ.get("RANK", 0)) != 0:
        return name
    answer: list[Any] = []

    def ask() -> None:
        try:
            answer.append(HfApi().whoami())
        except Exception as error:
            answer.append(error)

    thread = threading.Thread(target=ask, daemon=True)  # no timeout covers a name server that does not answer
    thread.start()
    thread.join(seconds)
    user = answer[0] if answer else TimeoutError()
    if isinstance(user, HfHubHTTPError) and user.response.status_code in (401, 403):
        refuse(KEY, "the Hub does not accept the token", "hf auth login with a valid one")
    if isinstance(user, Exception):
        refuse(KEY, "the Hub does not answer", f"try again, or {LATER}")
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        refuse(KEY, "the token may only read", "hf auth login with one that may write")
    mine = [user["name"], *(organisation["name"] for organisation in user.get("orgs", []))]
    owner, _, own = name.rpartition("/")
    if owner and owner not in mine:
        refuse(KEY, f"found {name!r}, and {owner!r} is not yours", f"allowed is one of {', '.join(mine)}")
    return f"{owner or user['name']}/{own}"


def public_adapter_config(folder: Path, run: Path) -> bytes | None:
    """Return adapter_config.json for the Hub, without the path of a base model on this machine.

    An embedded model gets its Hub name, a model in a folder the name of the folder. None if there is no such
    file, or if it names no path.
    """
    if not (folder / ADAPTER).exists():
        return None
    settings = json.loads((folder / ADAPTER).read_bytes())
    base = settings["base_model_name_or_path"]
    if not Path(base).is_absolute():
        return None
    given = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["model"]["name"]
    if (earlier := EarlierRun.of(given)) is not None:
        given = earlier.origin
    is_local = given.startswith("embedded:") or Path(given).expanduser().is_dir()
    settings["base_model_name_or_path"] = origin(given)[0] or (Path(base).name if is_local else given)
    return json.dumps(settings, indent=2).encode()


def push(run: Path, name: str) -> None:
    """Push best/, or else last/, of a run to the Hub. Print the address, or the command to push later."""
    folder = next(path for path in (run / "best", run / "last") if path.is_dir())
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        api = HfApi()
        api.create_repo(name, exist_ok=True)
        message = f"{folder.name}/ of a run of gradacc-hf"
        if adapter := public_adapter_config(folder, run):
            api.upload_file(
                repo_id=name, path_in_repo=ADAPTER, path_or_fileobj=adapter, commit_message=message
            )
        hidden = [ADAPTER] if adapter else None
        pushed = api.upload_folder(
            repo_id=name, folder_path=folder, commit_message=message, ignore_patterns=hidden
        )
        print(f"pushed {folder} to {pushed.repo_url}")
    except Exception as error:  # the run is saved, so a failed push only prints a line
        later = shlex.join(["hf", "upload", name, str(folder), "."])
        print(f"not pushed: {redact(one_line(error))[:300]}; push it later: {later}", file=sys.stderr)
