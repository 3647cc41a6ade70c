"""Write the page as a Space for the Hub: a folder with the page, this package and the requirements."""

import shutil
from importlib import metadata
from pathlib import Path

import gradacc_hf
from gradacc_hf.errors import InputError
from gradacc_hf.utils.extras import pinned
from gradacc_hf.utils.files import write_whole
from gradacc_hf.utils.paths import bundle_root

APP = '''"""The page of `gradacc play`, as a Space."""

from gradacc_hf.play.command import serve

if __name__ == "__main__":
    serve()
'''
README = """\
---
title: Gradient accumulation, while it happens
emoji: 🪣
colorFrom: blue
colorTo: yellow
sdk: gradio
sdk_version: {gradio}
python_version: "3.12"
app_file: app.py
license: apache-2.0
short_description: A real training loop, shown micro-batch by micro-batch
---

The loop of gradacc-hf {version} trains a small model. The page shows what gradient accumulation does and what
it does not do. Every number is measured during training.

`gradacc play --space` wrote this folder. The Space runs on a CPU, without network access and without secrets.
"""


def write_space(folder: Path) -> Path:
    """Write the Space, to push with `hf upload` or to run with `python app.py`.

    Raises:
        InputError: if the folder exists and is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"--space: {folder} exists and is not overwritten; give a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    package = folder / "gradacc_hf"
    ignored = shutil.ignore_patterns("__pycache__", "_kit")
    shutil.copytree(Path(gradacc_hf.__file__).parent, package, ignore=ignored)
    for name in ("recipes", "configs"):  # as in an installed package
        shutil.copytree(bundle_root() / name, package / "_kit" / name, ignore=ignored)
    versions = {"gradio": metadata.version("gradio"), "version": metadata.version("gradacc-hf")}
    write_whole(folder / "README.md", README.format(**versions))
    write_whole(folder / "requirements.txt", "\n".join([*pinned("play"), ""]))
    write_whole(folder / "app.py", APP)
    return folder
