"""Two encoders joined to an encoder-decoder: the second attends to the outputs of the first.

Only the decoder's cross-attention and the layer before its output embeddings are new (BERT2BERT:
Rothe, Narayan and Severyn, "Leveraging Pre-trained Checkpoints for Sequence Generation", 2020).
"""

import copy
import warnings
from typing import Any

import torch
from transformers import EncoderDecoderConfig, EncoderDecoderModel

from gradacc_hf.errors import InputError
from gradacc_hf.recipe.base import Recipe


class EncoderDecoder(Recipe):
    """A recipe whose model is an encoder-decoder, or two encoders of `model.name` joined to one."""

    def model_config(self) -> Any:
        config = super().model_config()
        if config.is_encoder_decoder:
            return config
        return joined_config(config, self.tokenizer, self.config.model.name)

    def load_pretrained(self, **options: Any) -> Any:
        warnings.filterwarnings("ignore", "Version v4.12.0")  # about the training of joined models before it
        if self.base_config().is_encoder_decoder:
            return super().load_pretrained(**options)
        with self.loading_errors("weights"):
            model = join(
                self.model_path, self.model_config(), dtype=self.dtype, **options, **self.source_options()
            )
        self.new_parameters = new_parameters(model)
        self.note_head(model, "two encoders are joined")
        return model


def joined_config(config: Any, tokenizer: Any, name: str) -> Any:
    """Return the EncoderDecoderConfig of two models of `config`.

    Raise InputError if the tokenizer adds no first and last token to a text.
    """
    start, end = tokenizer.cls_token_id, tokenizer.sep_token_id
    if start is None or end is None:
        raise InputError(
            f"model.name: {name} is neither an encoder-decoder nor an encoder like BERT, whose tokenizer "
            "frames a text with two tokens; use such a model"
        )
    joined = EncoderDecoderConfig.from_encoder_decoder_configs(
        config,
        copy.deepcopy(config),
        decoder_start_token_id=start,
        eos_token_id=end,
        pad_token_id=tokenizer.pad_token_id,
    )
    joined._attn_implementation = config._attn_implementation
    return joined


def new_parameters(model: Any) -> set[str]:
    """Return the parameters of the joined model with new weights: those whose name the encoder lacks."""
    known, prefix = dict(model.encoder.named_parameters()), f"{model.decoder.base_model_prefix}."
    names = (name for name, _ in model.decoder.named_parameters())
    return {f"decoder.{name}" for name in names if name.removeprefix(prefix) not in known}


def join(path: str, config: Any, **options: Any) -> Any:
    """Return the EncoderDecoderModel of `joined_config`, with the weights of `path` in both halves.

    `options` go to `from_pretrained`. On torch's meta device no weights are loaded.
    """
    if torch.get_default_device().type == "meta":
        return EncoderDecoderModel(config)
    halves = {"encoder": config.encoder, "decoder": config.decoder}
    options = {f"{half}_{name}": value for half in halves for name, value in options.items()}
    configs = {f"{half}_config": config for half, config in halves.items()}
    model: Any = EncoderDecoderModel.from_encoder_decoder_pretrained(path, path, **configs, **options)
    for name in ("decoder_start_token_id", "eos_token_id", "pad_token_id"):
        for holder in (model.config, model.generation_config):
            setattr(holder, name, getattr(config, name))
    return model
