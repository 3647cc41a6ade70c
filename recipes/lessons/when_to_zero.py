"""When to zero the gradients? Before every backward, never, or after the step: the gradients of the steps.

Run it: gradacc lessons when_to_zero. The doctor finds: zeroed_inside_the_window, never_zeroed.
"""

import torch
from accelerate import Accelerator
from torch.nn.functional import mse_loss

from gradacc_hf import WindowLoader

torch.manual_seed(0)
X = torch.randn(128, 5)  # 4 windows of 4 micro-batches of 8 examples
Y = X @ torch.randn(5, 1) + torch.randn(128, 1)


def new_model():
    torch.manual_seed(1)
    model = torch.nn.Linear(5, 1)
    return model, torch.optim.SGD(model.parameters(), lr=0.0)  # at lr 0, the weights do not change


def plain(zero):
    """Return the gradients of the four steps, (4, 5), in plain PyTorch."""
    (model, optimizer), gradients = new_model(), []
    for i, (x, y) in enumerate(zip(X.split(8), Y.split(8), strict=True), start=1):
        if zero == "before every backward":
            optimizer.zero_grad()
        (mse_loss(model(x), y) / 4).backward()
        if i % 4 == 0:
            gradients.append(model.weight.grad.clone())
            optimizer.step()
            if zero == "after the step":
                optimizer.zero_grad()
    return torch.cat(gradients)


def gradacc():
    """Return the same gradients with gradacc."""
    model, optimizer = (accelerator := Accelerator(cpu=True)).prepare(*new_model())
    examples, gradients = [{"x": x, "labels": y} for x, y in zip(X, Y, strict=True)], []
    for window in WindowLoader(examples, 32, micro_batch_size=8, shuffle=False, accelerator=accelerator):
        for batch in window:
            with accelerator.accumulate(model):
                accelerator.backward(window.weigh(mse_loss(model(batch["x"]), batch["labels"])))
                last = model.weight.grad.clone()
                optimizer.step()
                optimizer.zero_grad()  # acts at the window's last micro-batch
        gradients.append(last)
    return torch.cat(gradients)


def main():
    (model, _), found = new_model(), {}
    losses = [mse_loss(model(x), y) for x, y in zip(X.split(32), Y.split(32), strict=True)]
    truth = torch.cat([torch.autograd.grad(loss, model.weight)[0] for loss in losses])  # windows at once
    ways = {name: plain(name) for name in ("before every backward", "never", "after the step")}
    print("zeroing                  length of each window's gradient, × the right one            error")
    for name, gradients in (ways | {"in gradacc": gradacc()}).items():
        lengths = gradients.norm(dim=1) / truth.norm(dim=1)
        error = (torch.dist(gradients, truth) / truth.norm()).item()
        found[name] = {"lengths": lengths.tolist(), "error": error}
        print(f"{name:<24}", *(f"{length:<10.2f}" for length in lengths), f"{error:13.0e}")
    print("before every backward: only the last micro-batch remains.")
    print("never: the gradients of all earlier windows remain.")
    print("In gradacc: call `optimizer.zero_grad()` inside `accumulate`; it acts at the end of the window.")
    return found


def draw(axes, found):
    for name, way in found.items():
        axes.plot(range(1, 5), way["lengths"], marker="o", label=name)
    axes.set(
        title="Gradient at the step, × the window's gradient",
        xlabel="window",
        xticks=range(1, 5),
        ylabel="length",
    )


if __name__ == "__main__":
    main()
