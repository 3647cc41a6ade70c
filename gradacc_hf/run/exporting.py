"""`gradacc export`: write the model of a run for another library, and check it against the run's own outputs.

| to | library | tasks |
|---|---|---|
| onnx | torch.onnx; checked with ONNX Runtime | all whose answer is one forward pass |
| sentence-transformers | sentence-transformers | search |

A model that writes texts needs a cache between its forward passes, which torch.onnx does not write.
"""

import copy
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch

from gradacc_hf.accumulation.gradient_cache import Embedder
from gradacc_hf.config.earlier_run import ADAPTER_CONFIG
from gradacc_hf.config.schema import with_settings
from gradacc_hf.errors import InputError, refuse
from gradacc_hf.hub.model_card import write_card
from gradacc_hf.hub.usage import onnx_snippet, snippet
from gradacc_hf.recipe.base import Recipe
from gradacc_hf.run.merging import MODEL_FLAGS, WHOLE
from gradacc_hf.run.outputs import TOLERANCES, Difference, batch_of_rows, difference, outputs_of
from gradacc_hf.run.predict import folder_of
from gradacc_hf.run.source_weights import refuse_existing, write_source
from gradacc_hf.utils.extras import require
from gradacc_hf.utils.files import whole_folder

ROWS = 10  # of the validation data, whose outputs are compared
INPUTS = ("input_ids", "attention_mask", "token_type_ids", "pixel_values")
LARGEST_FILE = 2**31 - 2**20  # bytes of weights beside which one ONNX file can hold the rest
FORMATS = ("onnx", "sentence-transformers", "gguf")


def export(recipe: Recipe, run: Path, to: str, which: str = "best") -> tuple[Path, Difference]:
    """Write the model of a run to the folder `to` in the run, and compare outputs on rows of the data.

    Args:
        recipe: the recipe of the run.
        run: the folder of the run.
        to: one of `FORMATS`.
        which: the saved model, "best" or "last". The merged model stands for adapters.

    Returns:
        The folder, and the largest difference.

    Raises:
        InputError: the task has no such export, the folder exists, outputs differ too much, or the merged
            model is of other adapters. Nothing is written.
    """
    source, folder = folder_of(run, which), run / to
    write = _writer(recipe, to, run, source)
    refuse_existing(folder, run, which, f"gradacc export {run} --to {to}{MODEL_FLAGS[which]}")
    has_adapters, merged = (source / ADAPTER_CONFIG).is_file(), run / "merged"
    if has_adapters and not merged.is_dir():
        refuse(str(run), "it has adapters, which are not merged", f"gradacc merge {run}")
    recipe = recipe.with_config(with_settings(recipe.config, WHOLE))
    rows = batch_of_rows(recipe, ROWS)
    if has_adapters:
        _check_merged(recipe, merged, source, rows)
        source = merged
    batch = _inputs(rows)
    model = recipe.load(source).float().eval()
    recipe.model_path = recipe.processor_path = str(source)
    module = _TextEmbedder(model) if isinstance(model, Embedder) else model
    with whole_folder(folder) as unfinished:
        apply = write(recipe, module, source, batch, unfinished)
        found = _largest_difference(module, apply, batch)
        allowed = TOLERANCES[torch.float32]
        if not found.relative <= allowed:
            text = f"{folder} was not written, as its outputs are not the outputs of {source}: {found}"
            raise InputError(f"{text}; allowed is {allowed}")
        usage = onnx_snippet(recipe) if to == "onnx" else snippet(recipe, ".")
        write_card(recipe, run, which, unfinished, usage, library=to)
        write_source(unfinished, run, which)
    return folder, found


Apply = Callable[[Mapping[str, torch.Tensor]], list[torch.Tensor]]
"""Inputs → the outputs of what was written."""


class _TextEmbedder(torch.nn.Module):
    """Embed texts: the forward pass of an `Embedder` for one column."""

    def __init__(self, embedder: Embedder):
        super().__init__()
        self.embedder, self.config = embedder, embedder.config

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"sentence_embedding": self.embedder._embed(input_ids, attention_mask)}


def _check_merged(recipe: Recipe, merged: Path, adapters: Path, rows: Mapping[str, Any]) -> None:
    """Raise InputError if the merged model is not of these adapters, as after `gradacc continue`."""
    of_adapters, of_merged = (outputs_of(recipe.load(folder), rows, "cpu") for folder in (adapters, merged))
    found = difference(of_adapters, of_merged, len(of_adapters[0]))
    if not found.relative <= TOLERANCES[recipe.dtype]:
        cure = f"move it, and run gradacc merge {merged.parent} --model {adapters.name}"
        refuse(str(merged), f"its outputs are not the outputs of {adapters} ({found})", cure)


def _writer(recipe: Recipe, to: str, run: Path, source: Path) -> Callable[..., Apply]:
    """Return the function that writes a format. Raise InputError for a task without this format."""
    task = type(recipe).__name__
    if to == "gguf":
        has_adapters, merged = (source / ADAPTER_CONFIG).is_file(), run / "merged"
        first = f"run gradacc merge {run}; then " if has_adapters and not merged.is_dir() else ""
        cure = f"{first}convert_hf_to_gguf.py of llama.cpp converts {merged if has_adapters else source}"
        refuse("--to", "no library on PyPI writes gguf from a transformers model", cure)
    if to == "onnx" and recipe.writes_texts:
        _refuse_task(to, task, "a model that writes texts needs its cache, which torch.onnx does not write")
    if to == "sentence-transformers" and recipe.pipeline_tag != "sentence-similarity":
        _refuse_task(to, task, "only contrastive trains a model that embeds texts")
    require(f"gradacc export --to {to}", "export", *PACKAGES[to])
    return {"onnx": _write_onnx, "sentence-transformers": _write_sentence_transformer}[to]


PACKAGES = {
    "onnx": ("onnx", "onnxruntime", "onnxscript"),
    "sentence-transformers": ("sentence-transformers",),
}


def _refuse_task(to: str, task: str, why: str) -> NoReturn:
    refuse("--to", f"found {to} for a run of {task}", why)


def _inputs(batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return the inputs of a batch, without labels; of pairs of texts, the anchors."""
    plain = {name.removeprefix("anchor_"): tensor for name, tensor in batch.items()}
    return {name: plain[name] for name in INPUTS if name in plain}


def _largest_difference(module: Any, apply: Apply, batch: Mapping[str, torch.Tensor]) -> Difference:
    """Compare the outputs for all rows in one batch, and for each row alone without padding."""
    rows = len(next(iter(batch.values())))
    parts = [dict(batch), *(_row(batch, row) for row in range(rows))]
    found = [difference(outputs_of(module, part, "cpu"), apply(part), rows) for part in parts]
    return max(found, key=lambda one: one.relative)


def _row(batch: Mapping[str, torch.Tensor], row: int) -> dict[str, torch.Tensor]:
    one = {name: tensor[row : row + 1] for name, tensor in batch.items()}
    if "attention_mask" not in one:
        return one
    is_token = one["attention_mask"][0].bool()
    return {name: tensor[:, is_token] for name, tensor in one.items()}


def _write_onnx(
    recipe: Recipe, module: Any, source: Path, batch: Mapping[str, torch.Tensor], folder: Path
) -> Apply:
    """Write model.onnx for any number of rows and tokens, the config and the tokenizer or processor."""
    import onnxruntime  # type: ignore[import-not-found]  # of an extra

    config = copy.deepcopy(module.config)
    module.config.use_cache = False  # torch.onnx writes no cache, and one pass needs none
    names = {0: "rows", 1: "tokens"}
    shapes = {name: {0: "rows"} if name == "pixel_values" else names for name in batch}
    with torch.no_grad():
        outputs = [name for name, x in module(**batch).items() if isinstance(x, torch.Tensor)]
    size = sum(tensor.nbytes for tensor in module.state_dict().values())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.onnx, about names of axes and its own deprecations
        torch.onnx.export(
            module,
            (),
            str(folder / "model.onnx"),
            kwargs=dict(batch),
            dynamic_shapes=shapes,
            input_names=list(batch),
            output_names=outputs,
            dynamo=True,
            external_data=size > LARGEST_FILE,
            verbose=False,
        )
    config.save_pretrained(folder)
    for processor in recipe.processors():
        if hasattr(processor, "init_kwargs"):  # a tokenizer: what it returns is what the model takes
            processor.model_input_names = processor.init_kwargs["model_input_names"] = list(batch)
        processor.save_pretrained(folder)
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])

    def apply(inputs: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        found = session.run(outputs, {name: tensor.numpy() for name, tensor in inputs.items()})
        return [torch.from_numpy(array) for array in found]

    return apply


def _write_sentence_transformer(
    recipe: Recipe, module: Any, source: Path, batch: Mapping[str, torch.Tensor], folder: Path
) -> Apply:
    """Write a SentenceTransformer with the length of the run."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(source), device="cpu")
    model.max_seq_length = recipe.config.data.max_length
    model.save_pretrained(str(folder), create_model_card=False)
    written = SentenceTransformer(str(folder), device="cpu").eval()

    def apply(inputs: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        with torch.inference_mode():
            return [written(dict(inputs))["sentence_embedding"]]

    return apply
