"""Model cards: the README.md in best/ and last/, with which a model can be judged and used without its run.

A card is made from the run's folder: config.yaml, verify.json, and summary.json with the `Facts` of the run
under "card". During the run, `RunCard` writes a card without the final figures. `refresh_cards` writes the
complete card at the end, and again after `gradacc verify --run`. A card holds no names of local files, and
text that looks like a secret is hidden.
"""

import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset
from huggingface_hub import EvalResult, ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from gradacc_hf.accumulation.loader import WindowLoader
from gradacc_hf.data.files import is_data
from gradacc_hf.embedded import DATASETS, origin
from gradacc_hf.hub.usage import snippet
from gradacc_hf.recipe.base import Recipe
from gradacc_hf.training.run_log import versions
from gradacc_hf.utils.files import write_whole
from gradacc_hf.utils.redaction import redact
from gradacc_hf.utils.sample_size import small_set_note

TEMPLATE = Path(__file__).with_name("model_card.md.j2")
UNKNOWN = "unknown"  # a licence, as the Hub spells it
NO_METRICS = ("window", "loss")


@dataclass(frozen=True)
class Licence:
    """The licence in a model card; with `name` and `link` if the Hub does not list it."""

    id: str = UNKNOWN
    name: str | None = None
    link: str | None = None


@dataclass(frozen=True)
class Facts:
    """The facts in a card that are not in config.yaml or the figures of a run."""

    task: str  # one line about the recipe
    pipeline_tag: str | None
    base_model: str | None  # the name on the Hub; None for a model from elsewhere
    base_model_text: str
    licence: Licence
    data: str
    data_about: str  # one line about embedded data
    dataset: str | None  # the name on the Hub
    training_examples: int | None  # None: the rows of a stream
    validation_examples: int
    validation: str  # the source of the validation examples
    max_length: int | None  # most tokens of an example; None for examples that are not tokens
    usage: str  # lines of Python
    baseline_is: str = "a baseline that ignores the input"


def facts(recipe: Recipe, training: Dataset, validation: Dataset) -> Facts:
    """Return the facts of a run. The licence is read from the base model's card, if it has one."""
    config = recipe.config
    data, given = config.data, config.model.name if recipe.earlier is None else recipe.earlier.origin
    upstream, licence = origin(given)
    on_hub = upstream or (given if _is_hub_name(given) else None)
    source = recipe.validation_source.removeprefix("validation: ")
    train = ", ".join(one["source"] for one in data.mixture) or str(data.train)
    for name in (str(data.validation or train), train):
        if source.endswith(name):
            source = source.removesuffix(name) + _public(name)
            break
    return Facts(
        task=(type(recipe).__doc__ or type(recipe).__name__).partition("\n")[0],
        pipeline_tag=recipe.pipeline_tag,
        base_model=on_hub,
        base_model_text=on_hub or _base_model_text(recipe),
        licence=Licence(licence) if licence else read_licence(recipe.model_path),
        data=_public(train) + (f", {data.config_name}" if data.config_name else ""),
        data_about=_embedded_about(train),
        dataset=train if _is_hub_name(train) else None,
        training_examples=len(training) if recipe.opened is None else None,
        validation_examples=len(validation),
        validation=source,
        max_length=data.max_length if _is_tokenised(training) else None,
        usage=snippet(recipe, config.output.push_to_hub or "."),
        baseline_is=recipe.baseline_is,
    )


class RunCard:
    """Writes the card beside a model that is saved during a run."""

    def __init__(self, recipe: Recipe, facts: Facts, windows: WindowLoader):
        self.recipe, self.facts, self.windows = recipe, facts, windows
        self._metrics: Mapping[str, float] | None = None
        self._evaluated_at: dict[str, int] | None = None

    def evaluated(self, metrics: dict[str, float]) -> dict[str, float]:
        """Keep the metrics of the current model for its card, until the next window; return them."""
        self._metrics, self._evaluated_at = metrics, self.windows.state_dict()
        return metrics

    def save_pretrained(self, folder: Path) -> None:
        """Write README.md into a model's folder."""
        current = self._evaluated_at == self.windows.state_dict()
        summary = {"card": asdict(self.facts), "versions": versions(), **_how(self.windows)}
        card = make_card(folder, asdict(self.recipe.config), summary, self._metrics if current else None)
        card.save(folder / "README.md")


def _how(windows: WindowLoader) -> dict[str, Any]:
    accelerator = windows.accelerator
    precision = {"no": "fp32"}.get(accelerator.mixed_precision, accelerator.mixed_precision)
    return {
        "precision": precision,
        "processes": accelerator.num_processes,
        "micro_batches": windows.limit,
    }


def refresh_cards(run: Path) -> list[Path]:
    """Write the cards of an ended run again, from the files in its folder. Return the cards."""
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    file = run / "verify.json"
    verification = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    evaluations, written = read_evaluations(run), []
    for folder, metrics in ((run / "best", summary["best"]), (run / "last", summary["eval"])):
        if folder.is_dir():
            model = folder.name, (metrics or {}).get("window")  # a run that continues saves other models
            of_model = (one for one in evaluations if (one["model"], one.get("window")) == model)
            newest = {one["data"]: one for one in of_model}
            card = make_card(folder, config, summary, metrics, verification, [*newest.values()])
            written.append(folder / "README.md")
            write_whole(written[-1], str(card))
    return written


def read_evaluations(run: Path) -> list[dict[str, Any]]:
    """Return the evaluations of a run by `gradacc evaluate`, the newest last."""
    files = sorted((run / "evaluations").glob("*.json"), key=lambda file: file.stat().st_mtime)
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def write_card(
    recipe: Recipe, run: Path, which: str, folder: Path, usage: str, library: str | None = None
) -> None:
    """Write the card of a model that was made from a saved model of a run, if the run has ended.

    Args:
        recipe: The recipe of the run.
        run: The folder of the run.
        which: The saved model, "best" or "last".
        folder: The folder of the new model.
        usage: Lines of Python that use it.
        library: As in `make_card`.
    """
    if not (run / "summary.json").is_file():
        return
    summary: dict[str, Any] = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    summary["card"]["usage"] = usage
    metrics = summary["best" if which == "best" else "eval"]
    card = make_card(folder, asdict(recipe.config), summary, metrics, library=library)
    card.save(folder / "README.md")


def make_card(
    folder: Path,
    config: Mapping[str, Any],
    summary: Mapping[str, Any],
    metrics: Mapping[str, float] | None,
    verification: Mapping[str, Any] | None = None,
    evaluations: Sequence[Mapping[str, Any]] = (),
    library: str | None = None,
) -> ModelCard:
    """Return the card of the model in a folder.

    Args:
        folder: The folder of the model.
        config: The content of config.yaml.
        summary: The content of summary.json, or the part of it that is known during a run.
        metrics: The metrics of this model; None if it was not evaluated.
        verification: The content of verify.json.
        evaluations: The content of files in evaluations/, of this model.
        library: The library that loads the model; by default peft for adapters, else transformers.
    """
    known, scores = redact(summary["card"]), _numbers(metrics)
    licence = Licence(**known["licence"])
    is_adapter = (folder / "adapter_config.json").is_file()
    base = (known["base_model"] or "model").rpartition("/")[2]
    name = config["output"]["push_to_hub"] or f"{base}-fine-tuned"
    data = ModelCardData(
        license=licence.id,
        license_name=licence.name,
        license_link=licence.link,
        library_name=library or ("peft" if is_adapter else "transformers"),
        base_model=known["base_model"],
        base_model_relation=("adapter" if is_adapter else "finetune") if known["base_model"] else None,
        datasets=[known["dataset"]] if known["dataset"] else None,
        pipeline_tag=known["pipeline_tag"],
        tags=["gradacc-hf", "gradient-accumulation"],
        metrics=[metric for metric in scores if metric not in NO_METRICS] or None,
        model_name=name if scores else None,
        eval_results=[
            EvalResult(
                task_type=known["pipeline_tag"] or "other",
                dataset_type=known["dataset"] or "other",
                dataset_name=known["data"],
                metric_type=metric,
                metric_value=value,
            )
            for metric, value in scores.items()
            if metric != "window"
        ]
        or None,
    )
    settings = {name: config[name] for name in ("batch", "optim", "train", "budget")}
    if config["batch"]["effective"] != "noise_scale":
        settings["batch"] = {k: v for k, v in config["batch"].items() if k not in ("smallest", "largest")}
    return ModelCard.from_template(
        data,
        template_str=TEMPLATE.read_text(encoding="utf-8"),
        **redact(
            {
                "teacher": _teacher(summary),
                "name": name,
                "facts": known,
                "is_local": '"."' in known["usage"],
                "scores": {metric: value for metric, value in scores.items() if metric != "window"},
                "before": _numbers(_before_training(summary)),
                "baseline": _numbers(summary.get("baseline")),
                "window": scores.get("window"),
                "small_set": _small_set(scores, config, summary, known["validation_examples"]),
                "run": summary,
                "config": config,
                "verification": verification,
                "evaluations": [{**one, "data": _public_evaluation(one["data"])} for one in evaluations],
                "settings": yaml.safe_dump(settings, sort_keys=False, default_flow_style=None, width=1000),
            }
        ),
    )


def _before_training(summary: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the metrics of the model before training; None if they were not computed."""
    return next((row for row in summary.get("evaluations", ()) if row.get("window") == 0), None)


def _numbers(values: Mapping[str, Any] | None) -> dict[str, float]:
    return {
        name: value
        for name, value in (values or {}).items()
        if isinstance(value, int | float) and math.isfinite(value)
    }


def _teacher(summary: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the facts of the teacher, without names of local files; None without one."""
    if not (found := summary.get("teacher")):
        return None
    return {**found, "name": _public_model(found["name"]), "metrics": _numbers(found["metrics"])}


def _public_model(given: str) -> str:
    return given if given.startswith("embedded:") or _is_hub_name(given) else "a local model"


def _base_model_text(recipe: Recipe) -> str:
    if recipe.from_scratch:
        return "random weights"
    given = recipe.config.model.name if recipe.earlier is None else recipe.earlier.origin
    return given if given.startswith("embedded:") else "a local folder"


def read_licence(model_path: str) -> Licence:
    """Return the licence in the card of a base model, in its folder or on the Hub; unknown without a card."""
    with contextlib.suppress(Exception):  # no card, no network or no YAML: the licence is unknown
        folder = Path(model_path)
        file = folder / "README.md" if folder.is_dir() else Path(hf_hub_download(model_path, "README.md"))
        said = ModelCard.load(file, ignore_metadata_errors=True).data.to_dict()
        if isinstance(said.get("license"), str):
            return Licence(said["license"], said.get("license_name"), said.get("license_link"))
    return Licence()


def _is_tokenised(dataset: Dataset) -> bool:
    return any(name.endswith("input_ids") for name in dataset.column_names)


def _is_hub_name(given: str) -> bool:
    """Whether this can name a repository on the Hub, and is not a file, folder or embedded name."""
    try:
        validate_repo_id(given)
    except HFValidationError:
        return False
    return not is_data(Path(given)) and not Path(given).exists()


def _public(given: str) -> str:
    """Return `data.train` for a card, without names of local files, which may be private."""
    return given if _is_hub_name(given) or given.startswith("embedded:") else "local files"


def _small_set(
    scores: Mapping[str, float], config: Mapping[str, Any], summary: Mapping[str, Any], examples: int
) -> str | None:
    """Return a line if the validation set is too small for the metrics, or None."""
    metric = config["train"]["best_metric"]
    baseline = _numbers(summary.get("baseline")).get(metric)
    return small_set_note(metric, scores[metric], examples, baseline) if metric in scores else None


def _public_evaluation(data: str) -> str:
    """Return the data of an evaluation for a card, without names of local files."""
    given, comma, split = data.partition(", split ")
    return data if " " in given else _public(given) + comma + split


def _embedded_about(given: str) -> str:
    """Return the first line of the docstring of the module for embedded data; "" for other data."""
    if not given.startswith("embedded:"):
        return ""
    module = DATASETS[given.removeprefix("embedded:")].partition(":")[0]
    return (import_module(f"gradacc_hf.embedded.{module}").__doc__ or "").partition("\n")[0]
