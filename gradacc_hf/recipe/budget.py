"""The part of a budget that a recipe's model and inputs can use.

`config/budget.py` does the same for the machine. A key that only makes a run faster is left out if it has no
effect, with one line that names the key.
"""

from gradacc_hf.config.schema import with_settings
from gradacc_hf.errors import InputError
from gradacc_hf.recipe.base import Recipe
from gradacc_hf.utils.hardware import say


def fit_to_model(recipe: Recipe) -> Recipe:
    """Return the recipe with a budget that its model and inputs can use; print a line about each changed key.

    Call it after `recipe.datasets()`: the model's config depends on the data.
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
    """Return the settings that let the model choose its attention, and a line with the reason.

    Both are empty if the class of the model can use `budget.attention`.
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
        return change, [f"budget.attention: {name} has no {attention}: using the model's own choice"]
    return {}, []


def unusable_padding(recipe: Recipe) -> tuple[dict[str, None], list[str]]:
    """Return the settings that pad as little as possible, and a line with the reason.

    Both are empty if micro-batches of the task can be padded to a multiple.
    """
    if recipe.config.budget.pad_to_multiple_of is None:
        return {}, []
    why = ""
    if recipe.pad_to != "micro_batch":
        pads = {"window": "all examples of a window have one length", "nothing": "nothing is padded"}
        why = pads.get(str(recipe.pad_to), f"all examples are padded to {recipe.pad_to} tokens")
    elif recipe.tokens_are is not None:
        why = f"tokens are {recipe.tokens_are}"
    if not why:
        return {}, []
    line = f"budget.pad_to_multiple_of: no effect for {type(recipe).__name__}, where {why}"
    return {"budget.pad_to_multiple_of": None}, [line]
