"""`gradacc export`: write the model of a run for another library."""

import logging
from collections.abc import Sequence
from pathlib import Path

from gradacc_hf.hub.usage import loading_line
from gradacc_hf.recipe.loading import open_run
from gradacc_hf.run.exporting import FORMATS, export
from gradacc_hf.run.folder import refuse_links
from gradacc_hf.utils.commands import Parser
from gradacc_hf.utils.verbosity import silence_libraries


def main(argv: Sequence[str]) -> None:
    """Run the command. Raises InputError."""
    parser = Parser(
        prog="gradacc export",
        description="Write the model of a run for another library, to a folder of that name in the run. "
        "Outputs are compared with the run's on ten rows of the data. onnx: where an answer is one forward "
        "pass. sentence-transformers: for contrastive. gguf: refused, with the program that writes it.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a run, such as runs/NAME-1")
    parser.add_argument("--to", choices=FORMATS, required=True, help="the format")
    parser.add_argument(
        "--model",
        choices=("best", "last"),
        default="best",
        help="the saved model (default: %(default)s); for adapters, RUN/merged is exported",
    )
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="run Python code from the model's repository"
    )
    arguments = parser.parse_args(argv)
    silence_libraries()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    recipe = open_run(arguments.run, arguments.trust_remote_code)
    refuse_links(arguments.run.resolve(), "RUN")
    folder, found = export(recipe, arguments.run, arguments.to, arguments.model)
    print(f"{folder}: {found}")
    of_onnx = f"the lines of Python in {folder / 'README.md'}"
    print(f"next: {of_onnx if arguments.to == 'onnx' else loading_line(recipe, str(folder))}")
