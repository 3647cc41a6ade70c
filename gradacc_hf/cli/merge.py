"""`gradacc merge`: write the adapters of a run into a whole model."""

from collections.abc import Sequence
from pathlib import Path

from gradacc_hf.hub.usage import loading_line
from gradacc_hf.recipe.loading import open_run
from gradacc_hf.run.folder import refuse_links
from gradacc_hf.run.merging import merge
from gradacc_hf.utils.commands import Parser
from gradacc_hf.utils.verbosity import silence_libraries


def main(argv: Sequence[str]) -> None:
    """Run the command. Raises InputError."""
    parser = Parser(
        prog="gradacc merge",
        description="Add the adapters of a run to the weights of the base model. The whole model goes to "
        "RUN/merged, with its tokenizer, after its outputs were compared with the adapters' on rows of the "
        "data. Adapters that were trained on 4-bit weights are added to the full weights.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a run, such as runs/NAME-1")
    parser.add_argument(
        "--model", choices=("best", "last"), default="best", help="the saved adapters (default: %(default)s)"
    )
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="run Python code from the model's repository"
    )
    arguments = parser.parse_args(argv)
    silence_libraries()
    recipe = open_run(arguments.run, arguments.trust_remote_code)
    refuse_links(arguments.run.resolve(), "RUN")
    folder, found = merge(recipe, arguments.run, arguments.model)
    print(f"{folder}: {found}")
    print(f"next: {loading_line(recipe, str(folder))}")
