"""Do micro-batches count alike? Not with unequal numbers of tokens: a mean of means is not the mean.

Run it: gradacc lessons unequal_items. The doctor finds: mean_of_means.
"""

import torch
from accelerate import Accelerator
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from gradacc_hf import WindowLoader

TOKENS = (1, 2, 3, 30, 4, 2, 20, 1)  # labelled tokens in each of eight examples
torch.manual_seed(0)
EXAMPLES = [{"x": torch.randn(n, 8), "labels": torch.randint(5, (n,))} for n in TOKENS]


def collate(examples):
    """Pad to the longest. Padding has the label −100, which the loss leaves out."""
    x = pad_sequence([example["x"] for example in examples], batch_first=True)
    labels = pad_sequence([example["labels"] for example in examples], batch_first=True, padding_value=-100)
    return {"x": x, "labels": labels}


def mean_loss(model, batch):
    """Return the mean over the labelled tokens, as in token classifiers and language models."""
    return cross_entropy(model(batch["x"]).flatten(0, 1), batch["labels"].flatten())


def new_model():
    torch.manual_seed(1)
    return torch.nn.Linear(8, 5)


def plain(size, weight):
    """Return loss and gradient of the eight examples in weighted micro-batches, in plain PyTorch."""
    model, total = new_model(), 0.0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in (collate(EXAMPLES[i : i + size]) for i in range(0, 8, size)):
        loss = mean_loss(model, batch) * weight(batch)
        loss.backward()
        total += loss.item()
    optimizer.step()
    return total, model.weight.grad


def gradacc():
    """Return the same with gradacc, which counts the labels that are not −100."""
    model = (accelerator := Accelerator(cpu=True)).prepare(new_model())
    settings = {"micro_batch_size": 2, "shuffle": False, "accelerator": accelerator}
    for window in WindowLoader(EXAMPLES, 8, collate_fn=collate, **settings):
        for batch in window:
            with accelerator.accumulate(model):
                accelerator.backward(window.weigh(mean_loss(model, batch)))
    return window.loss, model.weight.grad


def main():
    loss, truth = plain(8, weight=lambda batch: 1)
    ways = {"mean of means": plain(2, weight=lambda batch: 1 / 4)}
    ways["by tokens"] = plain(2, weight=lambda batch: (batch["labels"] != -100).sum() / sum(TOKENS))
    ways["gradacc"] = gradacc()
    split = " + ".join(str(sum(TOKENS[i : i + 2])) for i in range(0, 8, 2))
    found = {"at once": {"loss": loss, "error": 0.0}}
    print(f"{sum(TOKENS)} labelled tokens at once: loss {loss:.4f}; in micro-batches of {split}:")
    for name, (loss, gradient) in ways.items():
        found[name] = {"loss": loss, "error": (torch.dist(gradient, truth) / truth.norm()).item()}
        print(f"{name:<14} loss {loss:.4f}, gradient error {found[name]['error']:.0e}")
    print("In gradacc: `num_items` counts the items of a mean; `window.weigh` scales the mean to its share.")
    return found


def draw(axes, found):
    axes.bar(list(found), [way["error"] for way in found.values()])
    axes.set(title="Error of the gradient of eight examples", ylabel="relative error")


if __name__ == "__main__":
    main()
