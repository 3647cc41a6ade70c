"""`gradacc new NAME --like RECIPE`: a recipe of one's own, with two configs and a test that passes."""

import keyword
import re
import sys
from collections.abc import Sequence
from importlib.metadata import packages_distributions
from pathlib import Path

from gradacc_hf.cli.main import configs, next_commands, recipes, write_files
from gradacc_hf.errors import InputError, listed, refuse
from gradacc_hf.utils.commands import Parser
from gradacc_hf.utils.paths import bundle_root

TEST = '''"""The recipe {name}: its configs are valid, it trains, and its accumulation is exact."""

import json
import math
import subprocess
import sys
from pathlib import Path

from gradacc_hf.recipe.loading import load_recipe

ROOT = Path(__file__).parents[1]
RECIPE, CONFIG, HUB_CONFIG = (
    ROOT / file for file in ("recipes/{name}.py", "configs/{name}_offline.yaml", "configs/{name}.yaml")
)
SMALL = ["--batch.effective", "8", "--data.validation_fraction", "0.02"]


def test_the_settings_of_both_configs_are_valid():
    for config in (CONFIG, HUB_CONFIG):
        assert type(load_recipe(["--config", str(config)])).__name__ == "{class_name}"


def test_it_trains_and_evaluates(tmp_path):
    run = tmp_path / "run"
    settings = ["--config", CONFIG, *SMALL, "--train.max_windows", "2", "--output.dir", run]
    subprocess.run([sys.executable, RECIPE, *settings], check=True)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["windows"] == 2
    assert math.isfinite(summary["eval"]["loss"])


def test_accumulation_is_exact():
    command = [sys.executable, "-m", "gradacc_hf", "verify", "--config", CONFIG, *SMALL]
    subprocess.run(command, check=True)
'''


def main(argv: Sequence[str]) -> None:
    """Write the files, and print them and the next commands. Writes nothing if one of them exists."""
    given = make_parser().parse_args(argv)
    allowed = [name for name in recipes() if configs(name)]
    if given.like not in allowed:
        cure = f"; gradacc cp {given.like} FOLDER copies it" if given.like in recipes() else ""
        refuse("--like", f"found {given.like!r}", f"allowed: {listed(allowed)}{cure}")
    files = files_of(given.name, given.like)
    targets = {given.folder / path: text for path, text in files.items()}
    write_files(targets, "written")
    script, offline, _, test = targets
    for line in next_commands(script, offline):
        print(line)
    print(f"test it: python -m pytest {test}")


def make_parser() -> Parser:
    """Return the parser of the command."""
    parser = Parser(
        prog="gradacc new",
        description="Write a recipe of your own with the code of an existing one. The files are "
        "recipes/NAME.py, configs/NAME_offline.yaml for embedded data, configs/NAME.yaml for the Hub, and "
        "tests/test_NAME.py. All of them work as they are.",
    )
    parser.add_argument("name", metavar="NAME", help="the name of the recipe, such as my_task")
    parser.add_argument(
        "--like", required=True, metavar="RECIPE", help="the recipe to begin with: see gradacc ls"
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path(),
        help="the folder in which the files are created (default: here)",
    )
    return parser


def files_of(name: str, like: str) -> dict[Path, str]:
    """Return the files of a recipe, by path. Raises InputError for a name that cannot be used."""
    is_name = re.fullmatch(r"[a-z][a-z0-9_]*", name) and not keyword.iskeyword(name)
    if not is_name or name in recipes():
        taken = "the name of a recipe of gradacc" if name in recipes() else "no name of a module"
        refuse("NAME", f"found {name!r}, {taken}", "allowed: small letters, digits and _, such as my_task")
    if name in sys.stdlib_module_names or name in packages_distributions():
        found = f"found {name!r}, the name of an installed module, which recipes/{name}.py would hide"
        refuse("NAME", found, "give another name, such as my_task")
    source = (bundle_root() / "recipes" / f"{like}.py").read_text(encoding="utf-8")
    (old_class,) = re.findall(r"^    run\((\w+)\)$", source, re.MULTILINE)
    new_class = "".join(part.capitalize() for part in name.split("_"))
    if re.search(rf"\b{new_class}\b", source):
        raise InputError(
            f"NAME: the class {new_class} is already used in recipes/{like}.py; give another name"
        )

    def renamed(text: str) -> str:
        text = text.replace("./launch.sh recipes/", "python recipes/")
        text = re.sub(rf"(?<=recipes/){like}(?=\.py)", name, text)
        return re.sub(rf"(?<=configs/){like}(?=(_offline)?\.yaml)", name, text)

    found = {Path("recipes") / f"{name}.py": re.sub(rf"\b{old_class}\b", new_class, renamed(source))}
    for suffix in ("_offline", ""):
        text = (bundle_root() / "configs" / f"{like}{suffix}.yaml").read_text(encoding="utf-8")
        found[Path("configs") / f"{name}{suffix}.yaml"] = renamed(text)
    found[Path("tests") / f"test_{name}.py"] = TEST.format(name=name, class_name=new_class)
    return found
