"""Tiny random models of every transformers head, for tests and the conformance table.

A head is a model class such as `BertForSequenceClassification`. `build_head(kind, model_type)` shrinks the
default config of a model type, field by field, builds the head and runs it once. A `Head` holds the model,
makes and collates examples for it, and holds the items of the loss. Nothing is downloaded. A head that cannot
be built raises `HeadUnavailableError` with the reason. `all_heads.py` verifies heads.
"""

import dataclasses
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto as auto

from gradacc_hf.accumulation.loss_items import IGNORED
from gradacc_hf.errors import HeadUnavailableError

CountItems = Callable[[Mapping[str, torch.Tensor]], int]

_AUTO = {  # kind: (auto class, its heads by model type)
    "sequence_classification": (
        auto.AutoModelForSequenceClassification,
        auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    ),
    "token_classification": (
        auto.AutoModelForTokenClassification,
        auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    ),
    "masked_lm": (auto.AutoModelForMaskedLM, auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
    "causal_lm": (auto.AutoModelForCausalLM, auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    "seq2seq_lm": (auto.AutoModelForSeq2SeqLM, auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
    "question_answering": (
        auto.AutoModelForQuestionAnswering,
        auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    ),
    "multiple_choice": (auto.AutoModelForMultipleChoice, auto.MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES),
    "image_classification": (
        auto.AutoModelForImageClassification,
        auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    ),
    "audio_classification": (
        auto.AutoModelForAudioClassification,
        auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
    ),
    "ctc": (auto.AutoModelForCTC, auto.MODEL_FOR_CTC_MAPPING_NAMES),
}
KINDS = tuple(_AUTO)
PROBLEMS = ("single_label", "multi_label", "regression")

_VOCAB, _LABELS, _CHOICES, _IMAGE = 128, 3, 2, 64
_TOKENS = {"pad": 0, "bos": 1, "eos": 2, "sep": 2}
_OTHER_TOKEN, _FIRST_WORD = 3, 5
_TOKEN_FIELD = r"\w+_token_(id|index)|(pad|bos|eos|sep|unk|mask)_index"

# Largest size by the name of a config field; the first match counts. Smaller defaults stay: 0 and -1 are off.
_SIZES = {
    r"type_vocab_sizes?": None,  # unchanged
    r"num_kv_shared_layers": 0,
    r".*vocab.*": _VOCAB,
    r"(num_|n_)?(\w+_)?(layers?|blocks|layers_per_stack)|depth": 2,
    r"depths|stage_num_blocks|stage_numb_of_layers": 1,
    r".*(key_value|kv)_heads|num_heads|linear_num_(key|value)_heads|num_query_groups": 2,
    r"mamba_n_heads|mamba_num_heads|n_mamba_heads": 8,
    r".*heads?(_per_layer)?": 4,
    r".*head_dim|d_kv|d_head|head_size|rotary_dim|kv_channels|mamba_d_head|mamba_headdim|key_dim": 8,
    r"(\w+_)?(lora_rank|state_size|d_state|dt_rank|time_step_rank|chunk_size)": 8,
    r"num_(local_|routed_)?experts|n_routed_experts|moe_num_experts": 4,
    r"num_experts_per_tok(en)?|moe_topk|moe_k": 2,
    r"n_groups?|topk_group|num_expert_group|mamba_n_groups|n_shared_experts": 1,
    r"(\w+_)?(ffn_dim|intermediate_size|ffn_hidden_size|hidden_dim|feed_forward_size)|d_ff|d_inner": 64,
    r"embed_dims?|d_rel": 16,
    r"(\w+_)?(hidden_sizes?|embedding_size|embed_dim|proj_dim|projection_dim)": 32,
    r"d_model|n_embd|emb_dim|dim|d_embed|d_latents|lru_width|conv_dim|classifier_proj_size|tdnn_dim": 32,
    r"(\w+_)?max_(\w+_)?position_embeddings|n_positions|max_(source|target)_positions|n_ctx|max_seq_len": 512,
    r"(\w+_)?(window|sliding_window)|local_attention|attention_chunk_size": 4,
    r"(\w+_)?window_size": 2,
    r"image_size": _IMAGE,
    r"patch_size": 8,
    r"num_conv_pos_embedding(s|_groups)": 4,
    r"num_mel_bins|feature_projection_input_dim": 16,
    r"max_length": 32,
    r"num_latents": 16,
    r"num_self_attends_per_block": 2,
}
# No randomness in training (dropout of every name, masking of audio, noise of routers), no tiny gradients.
_VALUES = {
    r".*drop.*|mask_(time|feature)_prob|.*jitter_noise|mask_ratio": 0.0,
    r"initializer_range|init_std|initializer_std": 0.2,
    r"layer_?scale_(init_)?value": 1.0,
    r"vocab_size": _VOCAB,
}
# Sizes that some configs leave at None although the model needs them.
_REQUIRED = r"vocab_size|head_dim|num_key_value_heads|num_experts_per_tok|n_(routed|shared)_experts"
# Fields whose size does not follow from the name.
_BY_MODEL_TYPE: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},  # one entry per layer
    "big_bird": {"attention_type": "original_full"},  # the fallback for short rows
    "layoutlmv3": {"coordinate_size": 4, "shape_size": 8},  # 4 × coordinate_size + 2 × shape_size = 32
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},  # there is no default
    "bit": {"num_groups": 8},  # layers have at least eight channels
    "lilt": {"hidden_size": 48},  # must be divisible by six
    "mamba2": {"num_heads": 8},  # num_heads × head_dim = 2 × hidden size
    "mobilebert": {"initializer_range": 0.05},  # there is no normalisation to limit activations
    "xmod": {"default_language": "en_XX"},
    # One of two layers has experts. At a lower capacity, they drop tokens by the rest of the batch.
    "nllb-moe": {"encoder_sparse_step": 2, "decoder_sparse_step": 2, "expert_capacity": 4096},
    "switch_transformers": {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
}
_INPUTS = {"input_ids", "input_values", "input_features"}  # tokens, samples or a spectrogram, a spectrogram


@dataclass(frozen=True)
class Head:
    """A tiny model with a head, in training mode and without dropout, with matching data."""

    kind: str  # one of KINDS
    model_type: str
    model: PreTrainedModel
    num_items: str | CountItems  # for WindowLoader: "labels", "next_token" or, for CTC, `count_rows`
    problem: str  # one of PROBLEMS, for sequence classification

    def examples(self, lengths: Sequence[int], seed: int = 0) -> list[dict[str, Any]]:
        """Return one unpadded example per length, in tokens (at least 3) or frames; images have one size."""
        if min(lengths, default=3) < 3:
            raise ValueError(f"lengths: found {min(lengths)}; allowed: 3 or more")
        rng = np.random.default_rng(seed)
        return [_example(self, int(length), rng) for length in lengths]

    def collate(
        self, examples: Sequence[Mapping[str, Any]], pad_to: int | None = None
    ) -> dict[str, torch.Tensor]:
        """Stack examples, padded on the right to the longest or to `pad_to` (tokens; samples or frames)."""
        columns = {name: [np.asarray(example[name]) for example in examples] for name in examples[0]}
        if "attention_mask" in inspect.signature(self.model.forward).parameters:
            for name in _INPUTS & columns.keys():
                shapes = [row.shape if name == "input_ids" else row.shape[:1] for row in columns[name]]
                columns["attention_mask"] = [np.ones(shape, dtype=np.int64) for shape in shapes]
        return {
            name: _stack(name, rows, None if self.kind == "ctc" and name == "labels" else pad_to)
            for name, rows in columns.items()
        }


def model_types(kind: str) -> list[str]:
    """Return every model type for which the installed transformers has a head of this kind."""
    return sorted(set(_AUTO[kind][1]))


def build_head(kind: str, model_type: str, *, seed: int = 0, problem: str = "single_label") -> Head:
    """Build one head with random weights drawn from `seed`. Raises HeadUnavailableError with the reason."""
    if kind not in KINDS:
        raise ValueError(f"kind: found {kind!r}, allowed: {', '.join(KINDS)}")
    if problem not in PROBLEMS:
        raise ValueError(f"problem: found {problem!r}, allowed: {', '.join(PROBLEMS)}")
    if problem != "single_label" and kind != "sequence_classification":
        raise ValueError(f"problem: found {problem!r}, but {kind} has only 'single_label'")
    if model_type not in _AUTO[kind][1]:
        raise HeadUnavailableError(f"{kind} of {model_type}: the installed transformers has no such head")
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            head = Head(kind, model_type, _build_model(kind, model_type, problem), "labels", problem)
            return dataclasses.replace(head, num_items=_find_items(head))
    except Exception as error:  # hundreds of model types may raise anything; the message is the reason
        reason = " ".join(str(error).split())[:200]
        raise HeadUnavailableError(f"{kind} of {model_type}: {type(error).__name__}: {reason}") from error


def count_rows(batch: Mapping[str, torch.Tensor]) -> int:
    """Count the examples: a CTC loss is a mean over examples, although the labels are sequences."""
    return len(batch["labels"])


def _build_model(kind: str, model_type: str, problem: str) -> PreTrainedModel:
    extra = dict(_BY_MODEL_TYPE.get(model_type, {}))
    if kind.endswith("classification"):
        extra["num_labels"] = 1 if problem == "regression" else _LABELS
    if kind == "sequence_classification":
        extra["problem_type"] = problem if problem == "regression" else f"{problem}_classification"
    if kind == "ctc":
        extra |= {"ctc_loss_reduction": "mean", "vocab_size": _VOCAB}
    auto_class, class_names = _AUTO[kind]
    names = class_names[model_type]
    extra["architectures"] = [names] if isinstance(names, str) else [names[0]]  # the first of several heads
    config = shrink(CONFIG_MAPPING[model_type](), extra)
    if kind == "causal_lm" and hasattr(config, "is_decoder"):
        config.is_decoder = True
    if config.is_encoder_decoder:
        config.decoder_start_token_id = _TOKENS["bos"]
    model = auto_class.from_config(config, dtype=torch.float32)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for parameter in model.parameters():  # class tokens and positions that start at zero
        if parameter.ndim > 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    return model.train()


def shrink(config: PreTrainedConfig, extra: Mapping[str, Any] = {}) -> PreTrainedConfig:
    """Return a config with tiny sizes. It is built from field defaults, so that derived fields fit."""
    small: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        name, value = field.name, vars(config).get(field.name)
        if isinstance(value, PreTrainedConfig):
            small[name] = shrink(value)
        elif isinstance(value, bool):  # a switch that the config around it may have set
            small[name] = value
        elif re.fullmatch(_TOKEN_FIELD, name):
            small[name] = _TOKENS.get(name.split("_")[0], _OTHER_TOKEN)
        elif field.default not in (None, dataclasses.MISSING):
            small[name] = _shrink_value(name, field.default)
        elif value is None and re.fullmatch(_REQUIRED, name):
            small[name] = _shrink_value(name, 10**9)
    default = {field.name: field.default for field in dataclasses.fields(config)}
    grouped = default.get("num_key_value_heads") != default.get("num_attention_heads")
    if "num_key_value_heads" in small and not grouped:
        small["num_key_value_heads"] = small["num_attention_heads"]
    if hasattr(config, "use_cache"):
        small["use_cache"] = False
    return type(config)(**(small | dict(extra)))


def _shrink_value(name: str, value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_shrink_value(name, part) for part in value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    for pattern, fixed in _VALUES.items():
        if re.fullmatch(pattern, name):
            return type(value)(fixed)
    size = next((size for pattern, size in _SIZES.items() if re.fullmatch(pattern, name)), None)
    return value if size is None else min(value, size)


def _find_items(head: Head) -> str | CountItems:
    """Run the head once, and return the items of the loss.

    For a language model, check whether the loss shifts labels. If only the first position is labelled, such a
    loss has no item: it is NaN or 0.
    """
    batch = head.collate(head.examples([7, 5]))
    with torch.no_grad():
        loss = head.model(**batch).loss
        if loss is None or not loss.isfinite():
            raise ValueError(f"the loss is {loss}")
        if head.kind == "ctc":
            return count_rows
        if head.kind not in ("causal_lm", "seq2seq_lm") or head.model.config.is_encoder_decoder:
            return "labels"
        first = torch.full_like(batch["input_ids"], IGNORED)
        first[:, 0] = batch["input_ids"][:, 0]
        loss = head.model(**(batch | {"labels": first})).loss
    return "labels" if loss.isfinite() and loss != 0 else "next_token"


def _example(head: Head, length: int, rng: np.random.Generator) -> dict[str, Any]:
    kind, config = head.kind, head.model.config
    if kind == "image_classification":
        pixels = rng.standard_normal((3, _IMAGE, _IMAGE), dtype=np.float32)
        return {"pixel_values": pixels, "labels": int(rng.integers(_LABELS))}
    if kind == "audio_classification":
        return {head.model.main_input_name: _sound(head, length, rng), "labels": int(rng.integers(_LABELS))}
    if kind == "ctc":
        return {head.model.main_input_name: _sound(head, length, rng), "labels": _words(rng, length // 3)}
    if kind == "multiple_choice":
        choices = [_two_segments(rng, length) for _ in range(_CHOICES)]
        return {"input_ids": choices, "labels": int(rng.integers(_CHOICES))}
    if kind == "question_answering":
        start, end = sorted(rng.integers(length, size=2).tolist())
        return {"input_ids": _two_segments(rng, length), "start_positions": start, "end_positions": end}

    ids = [*_words(rng, length - 1), _TOKENS["eos"]]
    if kind == "sequence_classification":
        labels = {
            "single_label": lambda: int(rng.integers(_LABELS)),
            "multi_label": lambda: rng.integers(2, size=_LABELS).astype(float).tolist(),
            "regression": lambda: float(rng.standard_normal()),
        }[head.problem]()
    elif kind == "token_classification":
        labels = _keep_some(rng, rng.integers(_LABELS, size=length).tolist(), share=0.8)
    elif kind == "masked_lm":
        labels = _keep_some(rng, ids, share=0.3)
    elif kind == "seq2seq_lm" and config.is_encoder_decoder:
        labels = [*_words(rng, int(rng.integers(1, length))), _TOKENS["eos"]]
    else:  # a causal head, under any kind; the prompt has no labels
        prompt = int(rng.integers(length - 1))
        labels = [IGNORED] * prompt + ids[prompt:]
    return {"input_ids": ids, "labels": labels}


def _words(rng: np.random.Generator, count: int) -> list[int]:
    return rng.integers(_FIRST_WORD, _VOCAB, size=count).tolist()


def _two_segments(rng: np.random.Generator, length: int) -> list[int]:
    """Return question, two separators, context, separator; some heads need all three separators."""
    ids = _words(rng, length)
    for i in (length // 3 - 1, length // 3, length - 1):
        ids[i] = _TOKENS["sep"]
    return ids


def _keep_some(rng: np.random.Generator, labels: Sequence[int], share: float) -> list[int]:
    kept = rng.random(len(labels)) < share
    kept[rng.integers(len(labels))] = True
    return np.where(kept, labels, IGNORED).tolist()


def _sound(head: Head, length: int, rng: np.random.Generator) -> np.ndarray:
    """Return samples or a spectrogram with at least `length` frames after the convolutions of the model."""
    config = head.model.config
    encoder = getattr(config, "encoder_config", config)
    bins = getattr(encoder, "num_mel_bins", None) or getattr(encoder, "feature_projection_input_dim", None)
    if bins is None:
        shape = (320 * (length + 1),)
    elif config.model_type == "whisper":  # one length, with the axes swapped
        shape = (bins, 2 * config.max_source_positions)
    elif head.model.main_input_name == "input_values":  # audio spectrogram transformer: one length
        shape = (config.max_length, bins)
    else:
        shape = (8 * length, bins)
    return rng.standard_normal(shape, dtype=np.float32)


def _stack(name: str, rows: Sequence[np.ndarray], pad_to: int | None) -> torch.Tensor:
    """Stack rows: pad tokens and labels on the last axis, pad sound on the first, leave others unpadded."""
    tokens = rows[0].ndim > 0 and rows[0].dtype.kind == "i"
    if tokens or name in _INPUTS:
        axis = rows[0].ndim - 1 if tokens else 0
        longest = max(row.shape[axis] for row in rows)
        length = longest if pad_to is None else pad_to
        if length < longest:
            raise ValueError(f"pad_to={pad_to} is shorter than the longest {name} of {longest}")
        value = IGNORED if name == "labels" else 0
        rows = [_pad(row, axis, length, value) for row in rows]
    stacked = torch.from_numpy(np.stack(rows))
    return stacked.float() if stacked.is_floating_point() else stacked


def _pad(row: np.ndarray, axis: int, length: int, value: int) -> np.ndarray:
    widths = [(0, length - size if i == axis else 0) for i, size in enumerate(row.shape)]
    return np.pad(row, widths, constant_values=value)
