"""`gradacc continue`: train a run that has ended further, exactly from its last state."""

from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path

from gradacc_hf.recipe.loading import open_run, recipe_class_of
from gradacc_hf.run import run
from gradacc_hf.utils.commands import Parser

EPILOG = """
The run continues in its folder: one history, one report. Give the length as a number to add or as a total.
The other settings stay as they were, except:

  --optim.lr, --optim.scheduler, --optim.warmup_ratio, --optim.decay_ratio, --optim.min_lr_ratio
                            a new schedule over the further windows.
                            Without them, the recorded schedule is stretched.
  --optim.max_grad_norm, --train.eval_every, --train.early_stopping
  --budget.KEY, --checkpoint.KEY, --output.tracker, --output.push_to_hub

examples:
  gradacc continue runs/NAME-1 --train.epochs +2
  gradacc continue runs/NAME-1 --train.max_windows +100 --optim.scheduler constant --optim.lr 1e-5
  accelerate launch --num_processes 2 -m gradacc_hf continue runs/NAME-1 --train.epochs +2
"""


def main(argv: Sequence[str]) -> None:
    """Run the command. Raises InputError."""
    parser = Parser(
        prog="gradacc continue",
        usage="gradacc continue RUN (--train.epochs +N | --train.max_windows +N) [--SETTING VALUE ...]",
        description="Train a run that has ended further, exactly from its last state.",
        epilog=EPILOG,
    )
    parser.formatter_class = RawDescriptionHelpFormatter
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a run, such as runs/NAME-1")
    if {"-h", "--help"} & {*argv}:
        parser.parse_args(["--help"])
    arguments, settings = parser.parse_args(argv[:1]), argv[1:]
    open_run(arguments.run)  # no code that came with a run is executed
    recipe = recipe_class_of(["--config", str(arguments.run / "config.yaml")])
    run(recipe, ["--continue", str(arguments.run), *settings])
