"""A contrastive loss over the whole window, however it is cut: the gradient cache (Gao et al. 2021, arXiv
2101.06983, section 3.2).

Each anchor is to pick its own positive among those of all pairs of the window, so that plain accumulation
loses the negatives of the other micro-batches. `ContrastiveLoss` embeds all micro-batches without graph,
takes the gradient of the one loss with respect to the embeddings, and hands it to each micro-batch as it
comes again. The loop that goes through a window twice is `loop.train`; that both passes draw the same dropout
is `window.py`'s. `Embedder` makes embeddings of pairs, `search` ranks them.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch.nn.functional import cross_entropy, normalize

from gradacc_hf.accumulation.window import Window
from gradacc_hf.utils.modeling import checkpoint_activations

COLUMNS = ("anchor", "positive", "negative")  # of a pair; the last, a hard negative, may be absent
TEXTS = 32  # that are embedded at once, where none is to be learned from
ROWS = 1024  # of a similarity matrix that are held at once
SAME = 0.02  # between two passes over a unit vector; another dropout moves it by tenths, bf16 by thousandths


def info_nce(
    embeddings: torch.Tensor,
    temperature: float,
    symmetric: bool,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """InfoNCE of pairs (van den Oord et al. 2018, equation 4) in float32: a mean over the pairs.

    `embeddings` (pairs, columns, size): anchor, positive and, where there is one, hard negative of each pair.
    An anchor's candidates are the positives and negatives of all pairs. `symmetric`: the mean of this and of
    the same from positives to anchors. `rows`: which terms of the mean are added up; by default all.
    """
    rows = torch.arange(len(embeddings), device=embeddings.device) if rows is None else rows
    with torch.autocast(embeddings.device.type, enabled=False):
        embeddings = _float32_at_least(embeddings) / temperature**0.5
        anchors, candidates = embeddings[:, 0], embeddings[:, 1:].transpose(0, 1).flatten(0, 1)
        total = cross_entropy(anchors[rows] @ candidates.T, rows, reduction="sum")
        if symmetric:
            back = cross_entropy(candidates[rows] @ anchors.T, rows, reduction="sum")
            total = (total + back) / 2
    return total / len(embeddings)


class ContrastiveLoss:
    """InfoNCE over all pairs of a window; its items are pairs.

    (embeddings of a micro-batch (pairs, columns, size), the batch) → a scalar: the loss of the whole window,
    with the gradient that goes through these pairs. In a loop, `look_ahead` comes before each window's
    micro-batches; without it, as in an evaluation, this is the loss of the batch alone. RuntimeError where
    the second pass over a micro-batch does not embed it as the first did.
    """

    def __init__(self, temperature: float = 0.05, symmetric: bool = True):
        self.temperature, self.symmetric = temperature, symmetric
        self._window: Window | None = None
        self._cache: list[tuple[torch.Tensor, torch.Tensor]] = []  # a micro-batch's embeddings, and gradient
        self._value = torch.tensor(0.0)

    def look_ahead(self, model: torch.nn.Module, window: Window) -> None:
        """Embed the window, over all processes, and keep its loss and the gradient of each embedding."""
        accelerator = window.accelerator
        if window.measures_noise:
            raise ValueError(
                "noise_every: a loss of all examples of a window together has no gradient of some of them, "
                "by which noise is measured; give the loader noise_every=0"
            )
        self._window, self._cache = None, []
        if window.accumulation_steps == accelerator.num_processes == 1:
            return  # the one micro-batch is the window
        if accelerator.distributed_type != DistributedType.FSDP:
            model = accelerator.unwrap_model(model)  # DDP's forward is collective; processes differ in number
        pieces, sizes = [], []
        with torch.no_grad():
            for batch in window:
                pieces.append(_float32_at_least(model(**batch)))
                # one that is run only because other processes wait has no part in the loss
                sizes.append(len(pieces[-1]) if window.micro_batch.num_items else 0)
        here = torch.cat([piece[:size] for piece, size in zip(pieces, sizes, strict=True)])
        everything, first = _gather(here, accelerator)
        self._value, gradient = self.of_all(everything)
        gradients = gradient[first : first + len(here)].clone().split(sizes)  # not those of all processes
        self._window, self._cache = window, list(zip(pieces, gradients, strict=True))

    def of_all(self, embeddings: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of all these pairs and its gradient with respect to them, strip by strip."""
        embeddings = embeddings.detach().requires_grad_()
        value = embeddings.new_zeros(())
        for rows in torch.arange(len(embeddings), device=embeddings.device).split(ROWS):
            part = info_nce(embeddings, self.temperature, self.symmetric, rows)
            part.backward()
            value += part.detach()
        assert embeddings.grad is not None
        return value, embeddings.grad

    @torch.no_grad()
    def value(self, embeddings: torch.Tensor) -> float:
        """The loss of all these pairs alone."""
        strips = torch.arange(len(embeddings), device=embeddings.device).split(ROWS)
        return sum(float(info_nce(embeddings, self.temperature, self.symmetric, rows)) for rows in strips)

    def __call__(self, embeddings: torch.Tensor, batch: Mapping[str, Any]) -> torch.Tensor:
        window = self._window
        position = None if window is None else window.position
        if window is None or position is None:
            return info_nce(embeddings, self.temperature, self.symmetric)
        embeddings = _float32_at_least(embeddings)
        first_pass, gradient = self._cache[position]
        moved = float(((embeddings.detach() - first_pass).norm(dim=-1) / first_pass.norm(dim=-1)).max())
        if position == len(self._cache) - 1:  # the last: nothing of the window is needed any more
            self._window, self._cache = None, []
        if moved > SAME:
            raise RuntimeError(
                f"micro-batch {position} is embedded {moved:.2g} away from where it was in the first pass: "
                "something in the model draws random numbers that torch's generators do not know of"
            )
        if not len(gradient):
            return self._value + 0.0 * embeddings.sum()
        share = window.micro_batch.num_items / window.num_items  # what weigh() multiplies by
        through = (embeddings * gradient).sum() / share
        return self._value + (through - through.detach())


def _float32_at_least(embeddings: torch.Tensor) -> torch.Tensor:
    return embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))


def _gather(here: torch.Tensor, accelerator: Any) -> tuple[torch.Tensor, int]:
    """The embeddings of all processes, which may hold different numbers of them, and where ours begin."""
    if accelerator.num_processes == 1:
        return here, 0
    counts = accelerator.gather(torch.tensor([len(here)], device=here.device)).tolist()
    padded = accelerator.gather(accelerator.pad_across_processes(here)).split(max(counts))
    everything = torch.cat([part[:count] for part, count in zip(padded, counts, strict=True)])
    return everything, sum(counts[: accelerator.process_index])


class Embedder(torch.nn.Module):
    """An encoder that gives each text of a pair one unit vector: the mean of its tokens' vectors.

    Takes `anchor_input_ids`, `anchor_attention_mask` (pairs, length) and so on for each of `COLUMNS` that
    there is; gives (pairs, columns, size). `save_pretrained` leaves the encoder, for `AutoModel`, and what
    tells `SentenceTransformer` how it is pooled.
    """

    def __init__(self, encoder: Any):
        super().__init__()
        self.encoder = encoder
        if isinstance(pooler := getattr(encoder, "pooler", None), torch.nn.Module):
            pooler.requires_grad_(False)  # of the first token: it has no part in the mean

    @property
    def config(self) -> Any:
        """The encoder's."""
        return self.encoder.config

    @property
    def device(self) -> torch.device:
        """The encoder's."""
        return self.encoder.device

    def forward(self, **batch: torch.Tensor) -> torch.Tensor:
        columns = [column for column in COLUMNS if f"{column}_input_ids" in batch]
        embedded = [
            self._embed(batch[f"{column}_input_ids"], batch[f"{column}_attention_mask"]) for column in columns
        ]
        return torch.stack(embedded, dim=1)

    def _embed(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        total = (_float32_at_least(hidden) * attention_mask[..., None]).sum(1)
        return normalize(total, dim=-1)  # as that of the mean

    @torch.no_grad()
    def embed(self, texts: Sequence[str], tokenizer: Any, max_length: int) -> torch.Tensor:
        """Texts → unit vectors (texts, size) on the host, dropout off."""
        self.eval()
        found = []
        for start in range(0, len(texts), TEXTS):
            tokens = tokenizer(
                list(texts[start : start + TEXTS]),
                padding=True,
                truncation=True,
                max_length=max_length,
                return_tensors="pt",
            )
            tokens = tokens.to(self.device)
            found.append(self._embed(tokens["input_ids"], tokens["attention_mask"]))
        return torch.cat(found).cpu()

    def gradient_checkpointing_enable(self, settings: dict[str, Any] | None = None) -> None:
        """As of a transformers model, with the settings of `checkpoint_activations`."""
        checkpoint_activations(self.encoder)

    def save_pretrained(
        self, folder: Path | str, state_dict: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        """Write the encoder as transformers does, and sentence-transformers' note of how it is pooled."""
        state = self.state_dict() if state_dict is None else state_dict
        self.encoder.save_pretrained(
            folder, state_dict={name.removeprefix("encoder."): tensor for name, tensor in state.items()}
        )
        (pooling := Path(folder, "1_Pooling")).mkdir(exist_ok=True)
        size = {"word_embedding_dimension": self.config.hidden_size, "pooling_mode_mean_tokens": True}
        (pooling / "config.json").write_text(json.dumps(size, indent=2))
        modules = [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (path, kind) in enumerate(
                (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))
            )
        ]
        Path(folder, "modules.json").write_text(json.dumps(modules, indent=2))


def search(queries: torch.Tensor, candidates: torch.Tensor, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The most similar candidates of each query, the best first: cosines and indices, (queries, number).

    Both are unit vectors, (queries, size) and (candidates, size).
    """
    found = [(some @ candidates.T).topk(min(number, len(candidates)), dim=1) for some in queries.split(ROWS)]
    return torch.cat([top.values for top in found]), torch.cat([top.indices for top in found])
