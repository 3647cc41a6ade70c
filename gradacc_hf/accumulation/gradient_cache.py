"""A contrastive loss over the whole window, with any split: the gradient cache.

Each anchor must select its positive among the positives of all pairs in the window. Plain accumulation loses
the negatives of the other micro-batches. `ContrastiveLoss` works in two passes. The first embeds all
micro-batches without a graph, and computes the gradient of the loss with respect to the embeddings. The
second runs each micro-batch again with this gradient. `training/loop.py` runs both passes. `window.py` gives
both passes the same dropout. `Embedder` embeds pairs, `search` ranks candidates. Equal texts are not
negatives of each other.

Source: Gao et al. 2021, arXiv 2101.06983, section 3.2.
"""

import json
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch._subclasses.fake_tensor import is_fake
from torch.nn.functional import cross_entropy, normalize

from gradacc_hf.accumulation.window import Window
from gradacc_hf.utils.modeling import checkpoint_activations

COLUMNS = ("anchor", "positive", "negative")  # of a pair; the hard negative may be absent
TEXTS_AT_ONCE = 32  # batch size of embedding without gradients
SIMILARITY_ROWS = 1024  # rows of the similarity matrix in memory at once
EMBEDDING_RTOL = 0.02  # largest difference of two passes: dropout gives about 0.1, bf16 about 0.001


def info_nce(
    embeddings: torch.Tensor,
    temperature: float,
    symmetric: bool,
    rows: torch.Tensor | None = None,
    texts: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return InfoNCE of pairs in float32, a mean over the pairs (van den Oord et al. 2018, equation 4).

    The candidates of an anchor are the positives and hard negatives of all pairs. All positives of an equal
    anchor are right. Right texts of other pairs are left out of the candidates.

    Args:
        embeddings: Anchor, positive and optional hard negative of each pair (pairs, columns, size).
        temperature: Divides the similarities.
        symmetric: Whether to average with the same loss from positives to anchors.
        rows: Indices of the terms of the mean to add up (rows,); by default all.
        texts: A number for each text (pairs, columns), equal for equal texts; by default all texts differ.
    """
    rows = torch.arange(len(embeddings), device=embeddings.device) if rows is None else rows
    forth, back = (None, None) if texts is None else _also_right(texts, rows)
    with torch.autocast(embeddings.device.type, enabled=False):
        embeddings = _float32_at_least(embeddings) / temperature**0.5
        anchors, candidates = embeddings[:, 0], embeddings[:, 1:].transpose(0, 1).flatten(0, 1)
        total = _cross_entropy(anchors[rows] @ candidates.T, rows, forth)
        if symmetric:
            total = (total + _cross_entropy(candidates[rows] @ anchors.T, rows, back)) / 2
    return total / len(embeddings)


def _cross_entropy(
    similarities: torch.Tensor, rows: torch.Tensor, left_out: torch.Tensor | None
) -> torch.Tensor:
    if left_out is not None:
        similarities = similarities.masked_fill(left_out, -torch.inf)
    return cross_entropy(similarities, rows, reduction="sum")


def _also_right(
    texts: torch.Tensor, rows: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor] | tuple[None, None]:
    """Return which candidates are right for the anchors of `rows`, and which anchors for their positives.

    The right one of the row itself is not included. None if no text occurs twice, or if the texts are fake
    tensors, which have no numbers (`memory/estimator.py`).
    """
    if is_fake(texts):
        return None, None
    different, texts = torch.unique(texts, return_inverse=True)
    if len(different) == texts.numel():
        return None, None
    anchors, positives, candidates = texts[:, 0], texts[:, 1], texts[:, 1:].T.flatten()
    found = []
    for queries, answers, among in ((anchors, positives, candidates), (positives, anchors, anchors)):
        row, pair = (queries[rows, None] == queries).nonzero(as_tuple=True)
        right = torch.zeros(len(rows), len(different), dtype=torch.bool, device=texts.device)
        right[row, answers[pair]] = True
        right = right[:, among]
        right[torch.arange(len(rows), device=texts.device), rows] = False
        found.append(right)
    return found[0], found[1]


def text_numbers(batch: Mapping[str, Any]) -> torch.Tensor | None:
    """Return a number for each text of a batch of `Embedder`, (pairs, columns): a hash of the tokens.

    Equal texts have equal numbers, however they are padded. None if the batch has no token ids.
    """
    columns = [column for column in COLUMNS if f"{column}_input_ids" in batch]
    if not columns:
        return None
    found = []
    for column in columns:
        tokens = batch[f"{column}_input_ids"].long()
        mask = batch.get(f"{column}_attention_mask")
        mask = torch.ones_like(tokens) if mask is None else (mask > 0).long()
        number = tokens + 0x9E3779B97F4A7C1 * mask.cumsum(1)  # of the token and its position
        for shift, factor in ((30, 0x3F58476D1CE4E5B9), (27, 0x14D049BB133111EB)):  # splitmix64
            number = (number ^ (number >> shift)) * factor
        found.append(((number ^ (number >> 31)) * mask).sum(1))
    return torch.stack(found, dim=1)


class ContrastiveLoss:
    """InfoNCE over all pairs of a window, a `WindowLoss`. An item is a pair.

    Call it with the embeddings of a micro-batch (pairs, columns, size) and the batch. It returns the loss of
    the whole window, a scalar. The gradient is the part that flows through these pairs. A loop calls
    `look_ahead` before the micro-batches of each window. Without `look_ahead`, as in an evaluation, the loss
    is over the batch alone. Texts are compared by the token ids of the batch (`text_numbers`).

    Args:
        temperature: Divides the similarities.
        symmetric: Whether to average the losses from anchors to positives and from positives to anchors.

    Raises:
        RuntimeError: The second pass gives other embeddings of a micro-batch than the first.
    """

    def __init__(self, temperature: float = 0.05, symmetric: bool = True):
        self.temperature, self.symmetric = temperature, symmetric
        self._window: Window | None = None
        self._cache: list[tuple[torch.Tensor, torch.Tensor]] = []  # embeddings and gradient, by micro-batch
        self._value = torch.tensor(0.0)

    def look_ahead(self, model: torch.nn.Module, window: Window) -> None:
        """Embed the window over all processes. Store the loss and the gradient of each embedding."""
        accelerator = window.accelerator
        if window.measures_noise:
            raise ValueError(
                "noise_every: a loss over a whole window has no gradient of some examples alone, so the "
                "noise scale cannot be measured; give the loader noise_every=0"
            )
        self._window, self._cache = None, []
        if window.accumulation_steps == accelerator.num_processes == 1:
            return  # the only micro-batch is the window
        if accelerator.distributed_type != DistributedType.FSDP:
            # DDP's forward is collective, and processes have unequal numbers of micro-batches.
            model = accelerator.unwrap_model(model)
        embedded, texts, sizes = [], [], []
        with torch.no_grad():
            for batch in window.forward_pass():
                embedded.append(_float32_at_least(model(**batch)))
                texts.append(text_numbers(batch))
                # An idle micro-batch adds nothing to the loss.
                sizes.append(len(embedded[-1]) if window.micro_batch.num_items else 0)
        parts = [embedded] if texts[0] is None else [embedded, texts]
        here = [torch.cat([each[:size] for each, size in zip(part, sizes, strict=True)]) for part in parts]
        everything, first = _gather(here, accelerator)
        self._value, gradient = self.of_all(*everything)
        gradients = gradient[first : first + sum(sizes)].clone().split(sizes)  # of this process only
        self._window, self._cache = window, list(zip(embedded, gradients, strict=True))

    def of_all(
        self, embeddings: torch.Tensor, texts: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss of all these pairs and the gradient of the embeddings, computed in strips."""
        embeddings = embeddings.detach().requires_grad_()
        value = embeddings.new_zeros(())
        for rows in torch.arange(len(embeddings), device=embeddings.device).split(SIMILARITY_ROWS):
            part = info_nce(embeddings, self.temperature, self.symmetric, rows, texts)
            part.backward()
            value += part.detach()
        assert embeddings.grad is not None
        return value, embeddings.grad

    @torch.no_grad()
    def value(self, embeddings: torch.Tensor, texts: torch.Tensor | None = None) -> float:
        """Return the loss of all these pairs, computed in strips. `texts` are as for `info_nce`."""
        strips = torch.arange(len(embeddings), device=embeddings.device).split(SIMILARITY_ROWS)
        parts = (info_nce(embeddings, self.temperature, self.symmetric, rows, texts) for rows in strips)
        return sum(map(float, parts))

    def __call__(self, embeddings: torch.Tensor, batch: Mapping[str, Any]) -> torch.Tensor:
        window = self._window
        position = None if window is None else window.position
        if window is None or position is None:
            return info_nce(embeddings, self.temperature, self.symmetric, texts=text_numbers(batch))
        embeddings = _float32_at_least(embeddings)
        first_pass, gradient = self._cache[position]
        moved = float(((embeddings.detach() - first_pass).norm(dim=-1) / first_pass.norm(dim=-1)).max())
        if position == len(self._cache) - 1:  # the last micro-batch: the window is no longer needed
            self._window, self._cache = None, []
        if moved > EMBEDDING_RTOL:
            raise RuntimeError(
                f"the embeddings of micro-batch {position} differ by {moved:.2g} between the two passes: the "
                "model must draw random numbers only from torch's generators"
            )
        if not len(gradient):
            return self._value + 0.0 * embeddings.sum()
        share = window.micro_batch.num_items / window.num_items  # the factor of weigh()
        through = (embeddings * gradient).sum() / share
        return self._value + (through - through.detach())


def _float32_at_least(embeddings: torch.Tensor) -> torch.Tensor:
    return embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))


def _gather(here: list[torch.Tensor], accelerator: Any) -> tuple[list[torch.Tensor], int]:
    """Return the rows of each tensor over all processes, and the index of the first row of this process."""
    if accelerator.num_processes == 1:
        return here, 0
    counts = accelerator.gather(torch.tensor([len(here[0])], device=here[0].device)).tolist()
    everything = []
    for tensor in here:
        padded = accelerator.gather(accelerator.pad_across_processes(tensor)).split(max(counts))
        everything.append(torch.cat([part[:count] for part, count in zip(padded, counts, strict=True)]))
    return everything, sum(counts[: accelerator.process_index])


class Embedder(torch.nn.Module):
    """An encoder that maps each text of a pair to a unit vector: the normalised mean of the token vectors.

    The input is `anchor_input_ids` and `anchor_attention_mask` (pairs, length), and the same for each other
    column of the batch in `COLUMNS`. The output is (pairs, columns, size). `save_pretrained` writes the
    encoder for `AutoModel`, and the pooling for `SentenceTransformer`.
    """

    def __init__(self, encoder: Any):
        super().__init__()
        self.encoder = encoder
        if isinstance(pooler := getattr(encoder, "pooler", None), torch.nn.Module):
            pooler.requires_grad_(False)  # it uses only the first token, so the mean does not need it

    @property
    def config(self) -> Any:
        """The config of the encoder."""
        return self.encoder.config

    @property
    def device(self) -> torch.device:
        """The device of the encoder."""
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
        return normalize(total, dim=-1)  # the same as for the mean

    @torch.no_grad()
    def embed(self, texts: Sequence[str], tokenizer: Any, max_length: int) -> torch.Tensor:
        """Return the embeddings of texts, without dropout: unit vectors (texts, size) on the host."""
        self.eval()
        found = []
        for start in range(0, len(texts), TEXTS_AT_ONCE):
            tokens = tokenizer(
                list(texts[start : start + TEXTS_AT_ONCE]),
                padding=True,
                truncation=True,
                max_length=max_length,
                return_tensors="pt",
            )
            tokens = tokens.to(self.device)
            found.append(self._embed(tokens["input_ids"], tokens["attention_mask"]))
        return torch.cat(found).cpu()

    def gradient_checkpointing_enable(
        self, settings: dict[str, Any] | None = None, offload: bool = False
    ) -> None:
        """Enable gradient checkpointing in the encoder, with the settings of `checkpoint_activations`."""
        checkpoint_activations(self.encoder, offload)

    def save_pretrained(
        self, folder: Path | str, state_dict: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        """Write the encoder for transformers, and the pooling config for sentence-transformers."""
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
    """Return the most similar candidates of each query, best first: cosines and indices (queries, number).

    Args:
        queries: Unit vectors (queries, size).
        candidates: Unit vectors (candidates, size).
        number: Maximum number of candidates per query.
    """
    found = [
        (some @ candidates.T).topk(min(number, len(candidates)), dim=1)
        for some in queries.split(SIMILARITY_ROWS)
    ]
    return torch.cat([top.values for top in found]), torch.cat([top.indices for top in found])


def search_positives(
    embeddings: torch.Tensor, texts: torch.Tensor, number: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Search each anchor's positives among all different positives.

    Args:
        embeddings: Of the pairs (pairs, columns, size).
        texts: The numbers of the texts (pairs, columns), from `text_numbers`.
        number: Maximum number of positives found per anchor.

    Returns:
        The positives found for each anchor, best first, and the right positives, as from `right_answers`.
    """
    right = right_answers(*texts[:, :2].T.tolist())
    different = sorted(set().union(*right))
    _, found = search(embeddings[:, 0], embeddings[different, 1], number)
    return torch.tensor(different)[found].tolist(), right


def right_answers(anchors: Sequence[Hashable], positives: Sequence[Hashable]) -> list[list[int]]:
    """Return the right positives of each anchor, each as the first row with this text.

    An anchor of several rows has all their positives as right ones.
    """
    first = dict(zip(reversed(positives), reversed(range(len(positives))), strict=True))
    right: dict[Hashable, set[int]] = {}
    for anchor, positive in zip(anchors, positives, strict=True):
        right.setdefault(anchor, set()).add(first[positive])
    return [sorted(right[anchor]) for anchor in anchors]
