"""An environment for launch.sh, as if launch.sh had made it."""

import subprocess
import sys
from pathlib import Path

from conftest import ROOT


def make_venv(folder: Path) -> Path:
    """Fill a folder with links to this environment, and with the stamp that says what is installed."""
    for part in ("bin", "lib", "pyvenv.cfg"):
        (folder / part).symlink_to(Path(sys.prefix) / part)
    wanted = subprocess.run(
        "cat pyproject.toml constraints.txt | cksum", shell=True, cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    (folder / ".gradacc-installed").write_text(f"{wanted} dev\n")
    return folder
