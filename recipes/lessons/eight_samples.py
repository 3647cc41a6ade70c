"""Why accumulate? Eight examples one at a time, a step for every four. The classic program does not divide.

Run it: gradacc lessons eight_samples. The doctor finds: not_divided.
"""

import torch
from accelerate import Accelerator
from torch.nn.functional import mse_loss

from gradacc_hf import WindowLoader

X = torch.tensor([[1.0, 2], [2, 1], [3, 4], [4, 3], [5, 6], [6, 5], [7, 8], [8, 7]])
Y = torch.tensor([[3.0], [3], [7], [7], [11], [11], [15], [15]])


def new_model():
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 1)
    return model, torch.optim.SGD(model.parameters(), lr=0.01)


def plain(divide_by):
    """Train one epoch in plain PyTorch. Return the predictions, and the norm of the first gradient."""
    (model, optimizer), norms = new_model(), []
    for i, (x, y) in enumerate(zip(X, Y, strict=True), start=1):
        (mse_loss(model(x), y) / divide_by).backward()  # adds to .grad
        if i % 4 == 0:
            norms.append(float(model.weight.grad.norm()))
            optimizer.step()
            optimizer.zero_grad()
    return model(X).flatten().tolist(), norms[0]


def closed_form():
    """Take the two steps in closed form: the gradient of the mean squared error is 2/4 Xᵀ(Xw − y)."""
    model = new_model()[0]
    w = torch.cat([model.weight.detach().T, model.bias.detach()[None]])  # (3, 1), the bias last
    examples = torch.cat([X, torch.ones(8, 1)], dim=1)
    for x, y in (examples[:4], Y[:4]), (examples[4:], Y[4:]):
        w = w - 0.01 * 2 / 4 * x.T @ (x @ w - y)
    return (examples @ w).flatten().tolist()


def gradacc():
    """Train the same epoch with gradacc: nothing to count, nothing to divide by."""
    model, optimizer = (accelerator := Accelerator(cpu=True)).prepare(*new_model())
    examples = [{"x": x, "labels": y} for x, y in zip(X, Y, strict=True)]
    for window in WindowLoader(examples, 4, micro_batch_size=1, shuffle=False, accelerator=accelerator):
        for batch in window:
            with accelerator.accumulate(model):
                accelerator.backward(window.weigh(mse_loss(model(batch["x"]), batch["labels"])))
                optimizer.step()
                optimizer.zero_grad()
    return model(X).flatten().tolist()


def main():
    (classic, classic_norm), (divided, norm) = plain(divide_by=1), plain(divide_by=4)
    found = {"label": Y.flatten().tolist(), "before": new_model()[0](X).flatten().tolist()}
    found |= {"classic": classic, "divided": divided, "gradacc": gradacc(), "closed form": closed_form()}
    print("prediction", *(f"{name:>12}" for name in found))
    for x, *example in zip(X.tolist(), *found.values(), strict=True):
        print(x, *(f"{value:12.3f}" for value in example))
    error = max(abs(a - b) for a, b in zip(found["gradacc"], found["closed form"], strict=True))
    ratio = classic_norm / norm
    print(f"The classic program never divides by 4: its first step is {ratio:.2f} times as long.")
    print(f"gradacc and the closed form of the two steps differ by at most {error:.0e}.")
    print("In gradacc: `window.weigh(loss)` scales each loss to its share of the window's mean.")
    return {**found, "step ratio": ratio, "error": error}


def draw(axes, found):
    for name in ("label", "before", "classic", "gradacc"):
        axes.plot(range(1, 9), found[name], marker="o", label=name)
    axes.set(title="Predictions after one epoch, two steps", xlabel="example", ylabel="prediction")


if __name__ == "__main__":
    main()
