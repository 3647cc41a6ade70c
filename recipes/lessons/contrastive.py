"""Do in-batch negatives accumulate? No: a micro-batch has only its own. The gradient cache restores others.

Run it: gradacc lessons contrastive. The doctor finds: in_batch_negatives_cut.
"""

import torch
from accelerate import Accelerator
from torch.nn.functional import cross_entropy, normalize
from torch.utils.data import default_collate

from gradacc_hf import WindowLoader

torch.manual_seed(0)
PAIRS = [{"query": q, "document": q + 0.5 * torch.randn(16)} for q in torch.randn(64, 16)]


class Encoder(torch.nn.Linear):
    def forward(self, query, document):  # unit vectors (pairs, 2, 8), and the loss of these pairs alone
        embeddings = normalize(super().forward(torch.stack([query, document], dim=1)), dim=-1)
        return {"embeddings": embeddings, "loss": contrastive_loss(embeddings)}


MODEL = Encoder(16, 8)
OPTIMIZER = torch.optim.SGD(MODEL.parameters(), lr=0.0)  # at lr 0, all ways have the same weights


def contrastive_loss(embeddings):
    """Return InfoNCE at temperature 0.1: each query selects its document among all documents."""
    return cross_entropy(embeddings[:, 0] @ embeddings[:, 1].T / 0.1, torch.arange(len(embeddings)))


def without_cache(window):
    """Yield the share of each micro-batch in a mean of losses. A micro-batch has only its own negatives."""
    for batch in window:
        yield MODEL(**batch)["loss"] / len(window)


def gradient_cache(window):
    """Yield scalars with the gradients of the whole loss, by micro-batch (Gao et al. 2021, section 3.2)."""
    with torch.no_grad():
        embeddings = [MODEL(**batch)["embeddings"] for batch in window]
    contrastive_loss(everything := torch.cat(embeddings).requires_grad_()).backward()
    for batch, cached in zip(window, everything.grad.split([len(e) for e in embeddings]), strict=True):
        yield (MODEL(**batch)["embeddings"] * cached).sum()  # the chain rule by hand


def plain(parts):
    MODEL.zero_grad()
    for part in parts:
        part.backward()
    OPTIMIZER.step()
    return MODEL.weight.grad


def gradacc(accelerator):
    MODEL.zero_grad()
    pairs = {"micro_batch_size": 16, "num_items": lambda batch: len(batch["query"])}
    for window in WindowLoader(PAIRS, 64, accelerator=accelerator, **pairs):
        for part in gradient_cache(window):
            with accelerator.accumulate(MODEL):  # already a share: undo the share of `weigh`
                accelerator.backward(window.weigh(part * len(window)))
    return MODEL.weight.grad


def main():
    found, gradients = {}, {}
    for n in (64, 32, 16, 8):
        window = [default_collate(PAIRS[i : i + n]) for i in range(0, 64, n)]
        with torch.no_grad():
            print(f"{n - 1:2} negatives for each query: loss {sum(without_cache(window)):.4f}")
        gradients[f"{64 // n} × {n}"] = plain(without_cache(window))
        gradients[f"{64 // n} × {n}, cached"] = plain(gradient_cache(window))
    for name, gradient in (gradients | {"gradacc, cached": gradacc(Accelerator(cpu=True))}).items():
        found[name] = ((gradient - gradients["1 × 64"]).norm() / gradients["1 × 64"].norm()).item()
        print(f"{name:<14} gradient error {found[name]:.0e}, against 64 pairs at once")
    print("In gradacc: `gradacc_hf.ContrastiveLoss`, also with dropout and on several processes.")
    return found


def draw(axes, found):
    axes.barh(*zip(*reversed(found.items()), strict=True))
    axes.set(title="The gradient of 64 pairs, by how they are split", xlabel="relative error")


if __name__ == "__main__":
    main()
