"""`evaluate` metrics that need no download: `load("accuracy").compute(predictions=…, references=…)`."""

from gradacc_hf.utils.extras import require

require(__name__, "recipes")

from difflib import get_close_matches
from typing import Any

import evaluate

from gradacc_hf.errors import InputError

from .classification import F1, Accuracy, MatthewsCorrelation
from .multi_label import MultiLabelMetric
from .regression import MeanSquaredError, Pearson, Spearman
from .retrieval import Retrieval
from .sequence_labelling import Seqeval
from .texts import Rouge, SacreBleu, Squad, SquadV2

METRICS: dict[str, type[evaluate.Metric]] = {
    "accuracy": Accuracy,
    "f1": F1,
    "matthews_correlation": MatthewsCorrelation,
    "mse": MeanSquaredError,
    "multi_label": MultiLabelMetric,
    "pearsonr": Pearson,
    "retrieval": Retrieval,
    "rouge": Rouge,
    "sacrebleu": SacreBleu,
    "seqeval": Seqeval,
    "spearmanr": Spearman,
    "squad": Squad,
    "squad_v2": SquadV2,
}

__all__ = ["METRICS", "load"]


def load(name: str, **settings: Any) -> evaluate.Metric:
    """Return the metric of this name, as `evaluate.load` does; `evaluate.combine` takes a list of them.

    `settings` go to `evaluate.Metric` (`cache_dir`, …). Raise InputError for a name not in METRICS.
    """
    if name not in METRICS:
        close = get_close_matches(name, METRICS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise InputError(f"no metric {name!r}; allowed: {', '.join(METRICS)}{hint}")
    return METRICS[name](**settings)
