"""Is it exactly a large batch? With LayerNorm and GroupNorm, yes; with BatchNorm, no, and why.

Run it: gradacc lessons batch_norm
"""

import torch
from accelerate import Accelerator
from torch.nn.functional import mse_loss
from torch.nn.utils import parameters_to_vector

from gradacc_hf import WindowLoader

NORMS = {"BatchNorm": torch.nn.BatchNorm1d, "LayerNorm": torch.nn.LayerNorm}
NORMS["GroupNorm"] = lambda width: torch.nn.GroupNorm(4, width)
torch.manual_seed(0)
X = torch.randn(64, 16)
Y = X.pow(2).sum(dim=1, keepdim=True)


def new_model(norm):
    torch.manual_seed(1)
    return torch.nn.Sequential(
        torch.nn.Linear(16, 32), NORMS[norm](32), torch.nn.ReLU(), torch.nn.Linear(32, 1)
    )


def plain(norm, size):
    """The gradient of 64 rows in micro-batches of `size`, and what the norm makes of the first row."""
    model, normalised = new_model(norm), []
    model[1].register_forward_hook(lambda module, inputs, output: normalised.append(output[0]))
    for x, y in zip(X.split(size), Y.split(size), strict=True):
        (mse_loss(model(x), y) * size / 64).backward()
    return parameters_to_vector(p.grad for p in model.parameters()), normalised[0]


def kit(norm, size):
    """The same gradient through the kit."""
    model = (accelerator := Accelerator(cpu=True)).prepare(new_model(norm))
    rows = [{"x": x, "labels": y} for x, y in zip(X, Y, strict=True)]
    for window in WindowLoader(rows, 64, micro_batch_size=size, shuffle=False, accelerator=accelerator):
        for batch in window:
            with accelerator.accumulate(model):
                accelerator.backward(window.weigh(mse_loss(model(batch["x"]), batch["labels"])))
    return parameters_to_vector(p.grad for p in model.parameters())


def main():
    def off(here, truth):
        return ((here - truth).norm() / truth.norm()).item()

    found = {}
    print("rows a micro-batch     gradient off by   in the kit   first row, normalised, off by")
    for norm in NORMS:
        (truth, row), errors = plain(norm, 64), []
        for size in (32, 16, 8, 4):
            gradient, row_here = plain(norm, size)
            errors.append((off(gradient, truth), off(kit(norm, size), truth), off(row_here, row)))
            print(f"{norm:<15} {size:2} {errors[-1][0]:19.0e} {errors[-1][1]:12.0e} {errors[-1][2]:22.0e}")
        found[norm] = dict(zip(("error", "kit", "row"), zip(*errors, strict=True), strict=True))
    print("BatchNorm divides a row by what varies in its micro-batch; the others look at that row alone.")
    print("In the kit: `try_out`, which `fine_tune` calls, names a model's BatchNorm modules before the run.")
    return found


def draw(axes, found):
    for norm, errors in found.items():
        axes.semilogy((32, 16, 8, 4), errors["error"], marker="o", label=norm)
    axes.set(title="Error of the gradient of 64 rows", xlabel="rows a micro-batch", ylabel="relative error")


if __name__ == "__main__":
    main()
