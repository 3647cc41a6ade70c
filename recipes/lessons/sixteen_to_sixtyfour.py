"""Is a batch of 16, accumulated over 4, one of 64? Loss, accuracy, the last window, and where to clip.

Run it: gradacc lessons sixteen_to_sixtyfour. The doctor finds: clipped_too_early.
"""

import torch
from accelerate import Accelerator
from torch.nn.functional import cross_entropy

from gradacc_hf import WindowLoader

torch.manual_seed(0)
X = torch.randn(2000, 10)  # 1,000 examples to train on, 1,000 to validate
Y = (X @ torch.randn(10) + torch.randn(2000) > 0).long()


def problem(seed):  # the order of the training examples, and initial weights
    torch.manual_seed(seed)
    order, model = torch.randperm(1000), torch.nn.Linear(10, 2, bias=False)
    return X[order], Y[order], model, torch.optim.SGD(model.parameters(), lr=0.1)


def plain(seed, max_norm, size, steps):  # drops the batches that fill no window
    (x, y, model, optimizer), losses = problem(seed), torch.zeros(10)
    for epoch in range(10):
        for i, examples in enumerate(torch.arange(1000).split(size)[: 63 // steps * steps], start=1):
            (cross_entropy(model(x[examples]), y[examples]) / steps).backward()
            if i % steps == 0:
                torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
                optimizer.step()
                optimizer.zero_grad()
        losses[epoch] = cross_entropy(model(x), y).detach()
    return losses, model.weight.detach()


def gradacc(seed, max_norm, clip_each=False):  # the same in windows of 64
    (x, y, *model_and_optimizer), losses = problem(seed), torch.zeros(10)
    model, optimizer = (accelerator := Accelerator(cpu=True)).prepare(*model_and_optimizer)
    examples = [{"x": a, "labels": b} for a, b in zip(x, y, strict=True)]
    for epoch in range(10):
        for window in WindowLoader(examples, 64, micro_batch_size=16, shuffle=False, accelerator=accelerator):
            for batch in window:
                with accelerator.accumulate(model):
                    accelerator.backward(window.weigh(cross_entropy(model(batch["x"]), batch["labels"])))
                    if clip_each or accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), max_norm)
                    optimizer.step()
                    optimizer.zero_grad()
        losses[epoch] = cross_entropy(model(x), y).detach()
    return losses, model.weight.detach()


def main():
    found, ways = (
        {},
        {"64": (plain, 64, 1), "16": (plain, 16, 1), "16 × 4": (plain, 16, 4), "gradacc": (gradacc,)},
    )
    for max_norm, more in ((torch.inf, {}), (0.1, {"gradacc, clipping each": (gradacc, True)})):
        truth = torch.stack([plain(seed, max_norm, 64, 1)[1] for seed in range(3)])
        for name, (way, *settings) in (ways | more).items():
            runs = [way(seed, max_norm, *settings) for seed in range(3)]
            losses, weights = map(torch.stack, zip(*runs, strict=True))  # (3, 10) and (3, 2, 10)
            error = (torch.dist(weights, truth) / truth.norm()).item()
            right = ((X[1000:] @ weights.mT).argmax(-1) == Y[1000:]).float().mean(-1)
            found[name, max_norm] = {"losses": losses.mean(0), "accuracy": right, "error": error}
            print(f"{name:>18}, max_norm {max_norm}: error of the weights {error:.0e}; validation", end=" ")
            print(f"accuracy {right.mean():.3f} ± {right.std():.3f}, training loss by epoch", end=" ")
            print(*(f"{loss:.3f}" for loss in losses.mean(0)))
    print(
        f"In gradacc: `WindowLoader` makes a step of the last {1000 % 64} examples; clip if `sync_gradients`."
    )
    return found


def draw(axes, found):
    for name in ("16", "16 × 4", "gradacc"):
        axes.plot(range(1, 11), found[name, torch.inf]["losses"], marker="o", label=name)
    axes.set(title="Loss, mean of three seeds", xlabel="epoch", ylabel="training loss")


if __name__ == "__main__":
    main()
