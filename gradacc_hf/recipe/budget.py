"""The part of a budget that a recipe's model and inputs can use.

`config/budget.py` does the same for the machine. A key that only makes a run faster is left out where it has
no effect, with one line that names the key.
"""

from gradacc_hf.config.schema import with_settings
from gradacc_hf.errors import InputError
from gradacc_hf.recipe.base import Recipe
from gradacc_hf.utils.hardware import say


def fit_to_model(recipe: Recipe) -> Recipe:
    """Return the recipe with a budget that its model and inputs can use; print a line about each other key.

    Call it after `recipe.datasets()`, which the model's config depends on.
    """
    changes, lines = unusable_padding(recipe)
    recipe = recipe.with_config(with_settings(recipe.config, changes))
    for line in lines:
        say(line)
    changes, lines = unusable_attention(recipe)
    for line in lines:
        say(line)
    return recipe.with_config(with_settings(recipe.config, changes))


def unusable_attention(recipe: Recipe) -> tuple[dict[str, None], list[str]]:
    """Return the change of settings that lets the model choose its attention, and a line that says why.

    Both are empty where the class of the model can compute attention as `budget.attention` says.
    """
    attention = recipe.config.budget.attention
    if attention is None:
        return {}, []
    try:
        recipe.empty_model()
    except InputError:
        change = {"budget.attention": None}
        model = recipe.with_config(
            with_settings(recipe.config, change)
        ).empty_model()  # raises any other error
        name = type(model).__name__
        return change, [f"budget.attention: {name} has no {attention}: the model's own choice instead"]
    return {}, []


def unusable_padding(recipe: Recipe) -> tuple[dict[str, None], list[str]]:
    """Return the change of settings that pads as little as possible, and a line that says why.

    Both are empty where micro-batches of the task can be padded to a multiple.
    """
    if recipe.config.budget.pad_to_multiple_of is None:
        return {}, []
    why = ""
    if recipe.pad_to != "micro_batch":
        pads = {"window": "windows are padded alike", "nothing": "nothing is padded"}
        why = pads.get(str(recipe.pad_to), f"all is padded to {recipe.pad_to} tokens")
    elif recipe.tokens_are is not None:
        why = f"its tokens are {recipe.tokens_are}"
    if not why:
        return {}, []
    line = f"budget.pad_to_multiple_of: of no use for {type(recipe).__name__}, where {why}"
    return {"budget.pad_to_multiple_of": None}, [line]
