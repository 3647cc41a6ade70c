"""LoRA through peft: train adapters and the new weights of the task, with a frozen base model.

`add_lora` adds adapters to a transformers model. The model keeps its class, so recipes, losses and `generate`
work unchanged. `write_pretrained` (`utils/files.py`) saves the adapters alone, `write_merged` a plain model.

Source: Hu et al. 2021, https://arxiv.org/abs/2106.09685; in 4 bits: Dettmers et al. 2023, QLoRA.
"""

import fnmatch
import os
import re
from collections.abc import Collection, Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version
from safetensors.torch import load_file
from transformers import PreTrainedModel
from transformers.integrations import peft as peft_integration

from gradacc_hf.errors import InputError, one_line
from gradacc_hf.training.settings import LoraConfig, ModelConfig
from gradacc_hf.utils.adapters import ADAPTER, keep_initial_adapters
from gradacc_hf.utils.extras import require

TESTED_PAIR = ("5.23.0", "0.21.2")  # transformers and peft, as in constraints.txt
FOUR_BIT_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def add_lora(model: Any, settings: LoraConfig, new_parameters: Collection[str] | None) -> None:
    """Freeze a model and add adapters, on the device of the model, in float32.

    Args:
        model: the model, changed in place.
        settings: rank, scale, target layers and kind of the adapters.
        new_parameters: names of parameters without pretrained weights; None if unknown. Their modules are
            trained in full and saved with the adapters.

    Raises:
        InputError: nothing in the model can be adapted.
    """
    require("model.lora", "recipes", "peft")
    check_peft()
    import peft  # late: slow to import
    from peft.functional import cast_adapter_dtype
    from transformers.pytorch_utils import Conv1D

    model = pretrained(model)
    if new_parameters is None or len(new_parameters) == len(dict(model.named_parameters())):
        raise InputError(
            f"model.lora.rank: found {settings.rank}, but this model has no pretrained weights to adapt; "
            "allowed is 0"
        )
    new_parameters = [name for name in new_parameters if model.get_parameter(name).requires_grad]
    new_modules = _new_modules(model, new_parameters)
    decomposes = settings.init == "pissa" and model.device.type != "meta"  # a plan has no weights
    adapters = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha or 2 * settings.rank,
        lora_dropout=settings.dropout,
        target_modules=_targets(model, settings.targets, new_modules),
        modules_to_save=new_modules or None,
        use_dora=settings.dora,
        use_rslora=settings.rslora,
        init_lora_weights="pissa" if decomposes else True,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    adapters.auto_mapping = {  # the AutoPeftModel… classes of peft need it to find the class
        "base_model_class": type(model).__name__,
        "parent_library": type(model).__module__,
    }
    try:
        with model.device:
            model.add_adapter(adapters)
    except ValueError as error:
        raise InputError(f"model.lora: peft cannot adapt this model: {one_line(error)[:200]}") from error
    cast_adapter_dtype(model, ADAPTER)
    if settings.init == "pissa":
        keep_initial_adapters(model)
    if os.path.isdir(path := str(adapters.base_model_name_or_path)):
        adapters.base_model_name_or_path = os.path.abspath(path)


def check_peft() -> None:
    """Raise InputError if the installed transformers does not accept the installed peft."""
    if message := installed_mismatch():
        raise InputError(f"model.lora: {message}")


def installed_mismatch() -> str | None:
    """Return `peft_mismatch` of the installed versions, with the minimum that transformers requires."""
    needed = getattr(peft_integration, "MIN_PEFT_VERSION", "0")
    return peft_mismatch(version("transformers"), version("peft"), needed)


def peft_mismatch(transformers: str, peft: str, needed: str) -> str | None:
    """Return an error line if peft is older than `needed`, else None."""
    if Version(peft) >= Version(needed):
        return None
    pair = 'pip install "transformers=={}" "peft=={}"'.format(*TESTED_PAIR)
    return (
        f"transformers {transformers} needs peft {needed} or newer, found peft {peft}; install that peft, "
        f"or the tested pair: {pair}"
    )


def pretrained(model: Any) -> Any:
    """Return the transformers model: `model` itself, or the one inside it."""
    return next(module for module in model.modules() if isinstance(module, PreTrainedModel))


def _new_modules(model: Any, new_parameters: Collection[str]) -> list[str]:
    """Return the modules whose parameters are all new.

    A head with a new bias and weights that are tied to the embeddings is not among them.
    """
    new = {id(model.get_parameter(name)) for name in new_parameters}
    parents = sorted({name.rpartition(".")[0] for name in new_parameters})
    return [name for name in parents if all(id(p) in new for p in model.get_submodule(name).parameters())]


def _targets(model: Any, patterns: list[str], new_modules: Collection[str]) -> list[str]:
    """Return the names of the modules that get an adapter; by default peft's choice for this model type."""
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as CHOSEN
    from transformers.pytorch_utils import Conv1D

    if not patterns and model.config.model_type in CHOSEN:
        return [*CHOSEN[model.config.model_type]]  # without them, peft finds none in a mixtral
    body, head = model.base_model, model.get_output_embeddings()
    prefix = next(f"{name}." if name else "" for name, module in model.named_modules() if module is body)
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D)
        and module is not head
        and not any(f"{name}.".startswith(f"{new}.") for new in new_modules)
    ]
    if not patterns:
        return [name for name in linear if name.startswith(prefix)]
    chosen: set[str] = set()
    for pattern in patterns:
        matching = {*fnmatch.filter(linear, pattern), *fnmatch.filter(linear, f"*.{pattern}")}
        if not matching:
            some = f"{linear[0]}, … {linear[-1]}" if linear else "none"
            raise InputError(f"model.lora.targets: {pattern!r} matches no linear layer; the model has {some}")
        chosen |= matching
    return sorted(chosen)


def load_adapter_weights(model: Any, folder: Path) -> None:
    """Load saved adapters, and the modules saved with them, into a model with adapters of the same settings.

    Raises:
        ValueError: the folder has other weights than the model trains.
    """
    from peft.utils import set_peft_model_state_dict

    saved = load_file(folder / "adapter_model.safetensors")
    plain = {name.removeprefix("base_model.model."): tensor for name, tensor in saved.items()}
    found = set_peft_model_state_dict(pretrained(model), plain, ADAPTER)
    trained = sum(parameter.requires_grad for parameter in model.parameters())
    if found.unexpected_keys or len(saved) != trained:
        raise ValueError(f"they are {len(saved)} tensors, and {trained} are trained here")


def write_merged(model: Any, folder: Path, state: Mapping[str, torch.Tensor]) -> None:
    """Save a plain model with the adapters added to the weights. The model itself is not changed.

    Memory: a copy of the weights, on the host.

    Args:
        model: the model with adapters.
        folder: an existing folder.
        state: the state dict of the model, gathered if the model is sharded.
    """
    from peft.tuners.lora import LoraLayer

    merged = dict(state)
    for prefix, module in model.named_modules():
        if isinstance(module, LoraLayer):
            layer: Any = module
            down, up = (state[f"{prefix}.lora_{part}.{ADAPTER}.weight"].cpu().float() for part in "AB")
            delta = layer.scaling[ADAPTER] * (up @ down)
            weight = state[f"{prefix}.base_layer.weight"].cpu()
            delta = delta.T if layer.fan_in_fan_out else delta
            lengths = state.get(f"{prefix}.lora_magnitude_vector.{ADAPTER}.weight")
            if lengths is None:
                total = weight + delta.to(weight)
            else:  # DoRA: rows of these lengths; of a transposed weight, columns
                total, row = weight.float() + delta, 0 if layer.fan_in_fan_out else 1
                lengths = lengths.cpu().float().unsqueeze(row)
                total = (lengths * total / total.norm(dim=row, keepdim=True)).to(weight)
            merged[f"{prefix}.base_layer.weight"] = total
    of_peft = (".lora_", ".original_module.")
    kept = {name: tensor for name, tensor in merged.items() if not any(part in name for part in of_peft)}
    inner = pretrained(model)
    with torch.device("meta"):  # only the parameter names and `save_pretrained` are needed
        plain = type(inner)(inner.config)
    if getattr(inner, "generation_config", None) is not None:
        plain.generation_config = inner.generation_config
    plain = plain if inner is model else type(model)(plain)
    wrappers = re.compile(rf"\.base_layer(?=\.)|\.modules_to_save\.{ADAPTER}(?=\.)")
    plain.save_pretrained(folder, state_dict={wrappers.sub("", name): t for name, t in kept.items()})


def check_four_bit(model: ModelConfig) -> None:
    """Raise InputError if `model.load_in_4bit` cannot work on this machine."""
    if not model.load_in_4bit:
        return
    if not torch.cuda.is_available():
        raise InputError("model.load_in_4bit: found true without a CUDA GPU; allowed is false here")
    if find_spec("bitsandbytes") is None:
        raise InputError("model.load_in_4bit: bitsandbytes is not installed: pip install bitsandbytes")


def four_bit(precision: str, new_parameters: Collection[str]) -> dict[str, Any]:
    """Return arguments of `from_pretrained` that load a base model in 4 bits, as in QLoRA.

    The format is NF4 with double quantisation.

    Args:
        precision: the format of the computation, as in `budget.precision`.
        new_parameters: names of parameters without pretrained weights. Their modules are trained, so they are
            not quantised.
    """
    from transformers import BitsAndBytesConfig

    new_modules = sorted({name.rpartition(".")[0] for name in new_parameters})
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=FOUR_BIT_DTYPES[precision],
        llm_int8_skip_modules=new_modules or None,  # with None, transformers skips the output layer
    )
    return {"quantization_config": quantization, "device_map": {"": torch.cuda.current_device()}}
