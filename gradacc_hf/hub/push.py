"""`--output.push_to_hub`: a run's model on the Hub, with its card.

What would make the push fail is looked for before the training; whatever fails after it leaves the run as it
is and says the command that pushes later. The token is huggingface_hub's own affair: nothing here keeps it.
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

from gradacc_hf.embedded import origin
from gradacc_hf.errors import one_line, refuse
from gradacc_hf.utils.redaction import redact

KEY = "output.push_to_hub"
ADAPTER = "adapter_config.json"
LATER = "push later instead: hf upload NAME RUN/best ."


def check_push(name: str, seconds: float = 15) -> str:
    """The full name, USER/NAME, of a repository that this user may write. Raises InputError.

    Only the first process asks the Hub, for at most `seconds`; the others give the name as it is.
    """
    try:
        validate_repo_id(name)
    except HFValidationError:
        refuse(KEY, f"found {name!r}", "allowed is NAME or USER/NAME, of letters, digits, -, _ and .")
    if constants.is_offline_mode():
        refuse(KEY, "the Hub is not to be asked here (HF_HUB_OFFLINE is set)", f"unset it, or {LATER}")
    if get_token() is None:
        refuse(KEY, "no token of the Hub is here", f"hf auth login, or {LATER}")
    if int(os.environ.get("RANK", 0)) != 0:
        return name
    answer: list[Any] = []

    def ask() -> None:
        try:
            answer.append(HfApi().whoami())
        except Exception as error:
            answer.append(error)

    thread = threading.Thread(target=ask, daemon=True)  # a name server that does not answer obeys no timeout
    thread.start()
    thread.join(seconds)
    user = answer[0] if answer else TimeoutError()
    if isinstance(user, HfHubHTTPError) and user.response.status_code in (401, 403):
        refuse(KEY, "the Hub does not accept the token that is here", "hf auth login with a valid one")
    if isinstance(user, Exception):
        refuse(KEY, "the Hub does not answer", f"try again, or {LATER}")
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        refuse(KEY, "the token that is here may only read", "hf auth login with one that may write")
    mine = [user["name"], *(organisation["name"] for organisation in user.get("orgs", []))]
    owner, _, own = name.rpartition("/")
    if owner and owner not in mine:
        refuse(KEY, f"found {name!r}, and {owner!r} is not yours", f"allowed is one of {', '.join(mine)}")
    return f"{owner or user['name']}/{own}"


def public_adapter_config(folder: Path, run: Path) -> bytes | None:
    """What adapter_config.json is to say on the Hub, where it names a folder of this machine as the base.

    Of an embedded model that is the name of what it carries, of another the folder's own name. None where
    there is no such file, or nothing to hide in it.
    """
    if not (folder / ADAPTER).exists():
        return None
    settings = json.loads((folder / ADAPTER).read_bytes())
    base = settings["base_model_name_or_path"]
    if not Path(base).is_absolute():
        return None
    given = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["model"]["name"]
    is_local = given.startswith("embedded:") or Path(given).expanduser().is_dir()
    settings["base_model_name_or_path"] = origin(given)[0] or (Path(base).name if is_local else given)
    return json.dumps(settings, indent=2).encode()


def push(run: Path, name: str) -> None:
    """Put best/, else last/, of a run on the Hub; say where it is or, where that fails, what to do."""
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
    except Exception as error:  # the run is over and saved, whatever became of its push
        later = shlex.join(["hf", "upload", name, str(folder), "."])
        print(f"not pushed: {redact(one_line(error))[:300]}; push it later: {later}", file=sys.stderr)
