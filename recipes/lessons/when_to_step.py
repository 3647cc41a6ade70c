"""Does it update after every batch? Steps on each micro-batch, compared with one step per window.

Run it: gradacc lessons when_to_step. The doctor finds: stepped_on_every_micro_batch, never_zeroed.
"""

import torch
from accelerate import Accelerator
from torch.nn.functional import mse_loss

from gradacc_hf import WindowLoader

torch.manual_seed(0)
X = torch.randn(32, 5)  # one window: 4 micro-batches of 8 examples
Y = X @ torch.randn(5, 1) + torch.randn(32, 1)


def new_model():
    torch.manual_seed(1)
    model = torch.nn.Linear(5, 1, bias=False)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def plain(step_every, zero_every):
    """Return the weights before and after each micro-batch, (1 + 4, 5), in plain PyTorch."""
    model, optimizer = new_model()
    weights = [model.weight.detach().clone()]
    for i, (x, y) in enumerate(zip(X.split(8), Y.split(8), strict=True), start=1):
        (mse_loss(model(x), y) / 4).backward()
        if i % step_every == 0:
            optimizer.step()
        if i % zero_every == 0:
            optimizer.zero_grad()
        weights.append(model.weight.detach().clone())
    return torch.cat(weights)


def gradacc():
    """Return the same weights with gradacc."""
    model, optimizer = (accelerator := Accelerator(cpu=True)).prepare(*new_model())
    examples = [{"x": x, "labels": y} for x, y in zip(X, Y, strict=True)]
    weights = [model.weight.detach().clone()]
    for window in WindowLoader(examples, 32, micro_batch_size=8, accelerator=accelerator):
        for batch in window:
            with accelerator.accumulate(model):
                accelerator.backward(window.weigh(mse_loss(model(batch["x"]), batch["labels"])))
                optimizer.step()  # acts at the window's last micro-batch
                optimizer.zero_grad()
            weights.append(model.weight.detach().clone())
    return torch.cat(weights)


def main():
    (model, _), found = new_model(), {}
    (gradient,) = torch.autograd.grad(mse_loss(model(X), Y), model.weight)
    step = -0.1 * gradient  # SGD's, on all 32 examples at once
    ways = {"every 4": plain(4, 4), "in gradacc": gradacc(), "every 1": plain(1, 1)}
    print("stepping                 length of the update at each micro-batch         error")
    for name, weights in (ways | {"every 1, zeroing every 4": plain(1, 4)}).items():
        moved = weights.diff(dim=0).norm(dim=1)
        error = ((weights[-1] - weights[0] - step).norm() / step.norm()).item()
        distance = (weights[1:] - weights[0]).norm(dim=1).tolist()
        found[name] = {"distance": distance, "updates": int((moved > 0).sum()), "error": error}
        shown = " ".join(f"{length:.3f}" for length in moved)
        print(f"{name:<25}{shown}{found[name]['updates']:6} updates {error:16.0e}")
    print("every 1: training on batches of 8, at a quarter of the learning rate.")
    print("every 1, zeroing every 4: early examples count several times.")
    print("In gradacc: call `optimizer.step()` inside `accumulate`; it acts at the end of the window.")
    return found


def draw(axes, found):
    for name, way in found.items():
        axes.plot(range(1, 5), way["distance"], marker="o", label=name)
    axes.set(title="How far the weights are from their start", xlabel="micro-batch", xticks=range(1, 5))


if __name__ == "__main__":
    main()
