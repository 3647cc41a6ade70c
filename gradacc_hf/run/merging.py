"""`gradacc merge`: add the adapters of a run to the weights of the base model, and check the result."""

from pathlib import Path

from gradacc_hf.config.earlier_run import ADAPTER_CONFIG
from gradacc_hf.config.schema import with_settings
from gradacc_hf.errors import InputError, refuse
from gradacc_hf.hub.model_card import write_card
from gradacc_hf.hub.usage import snippet
from gradacc_hf.recipe.base import Recipe
from gradacc_hf.run.outputs import TOLERANCES, Difference, batch_of_rows, difference, outputs_of
from gradacc_hf.run.predict import folder_of
from gradacc_hf.run.source_weights import refuse_existing, write_source
from gradacc_hf.training.lora import write_merged
from gradacc_hf.utils.files import whole_folder
from gradacc_hf.utils.hardware import find_device

ROWS = 10  # of the validation data, whose outputs are compared
WHOLE = {
    "model.load_in_4bit": False,  # 4-bit weights cannot hold the sum
    "budget.lean_loss": False,  # which computes no logits
    "budget.compile": False,
}

MODEL_FLAGS = {"best": "", "last": " --model last"}


def merge(recipe: Recipe, run: Path, which: str = "best") -> tuple[Path, Difference]:
    """Write a whole model to `merged/` in the folder of a run, and compare its outputs with the adapters'.

    Args:
        recipe: the recipe of the run.
        run: the folder of the run.
        which: the saved model, "best" or "last".

    Returns:
        The folder, and the largest difference.

    Raises:
        InputError: there are no adapters, the folder exists, or the outputs differ too much. Nothing is
            written.
    """
    folder, merged = folder_of(run, which), run / "merged"
    if not (folder / ADAPTER_CONFIG).is_file():
        refuse(str(folder), "it holds a whole model", f"there is nothing to merge: use {folder}")
    refuse_existing(merged, run, which, f"gradacc merge {run}{MODEL_FLAGS[which]}")
    recipe = recipe.with_config(with_settings(recipe.config, WHOLE))
    batch, device = batch_of_rows(recipe, ROWS), find_device().kind
    model = recipe.load(folder)
    recipe.model_path = recipe.processor_path = str(folder)
    before = outputs_of(model, batch, device)
    rows = len(before[0])
    with whole_folder(merged) as unfinished:
        write_merged(model, unfinished, model.state_dict())
        for processor in recipe.processors():
            processor.save_pretrained(unfinished)
        whole = recipe.with_config(with_settings(recipe.config, {"model.lora.merge": True}))
        write_card(recipe, run, which, unfinished, snippet(whole, "."))
        found = difference(before, outputs_of(recipe.load(unfinished), batch, device), rows)
        allowed = TOLERANCES[recipe.dtype]
        if not found.relative <= allowed:
            text = f"{merged} was not written, as its outputs are not the outputs of {folder}: {found}"
            raise InputError(f"{text}; allowed with model.dtype {recipe.config.model.dtype} is {allowed}")
        write_source(unfinished, run, which)
    return merged, found
