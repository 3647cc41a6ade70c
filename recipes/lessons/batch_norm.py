"""Is it exactly a large batch? Yes with LayerNorm and GroupNorm, no with BatchNorm.

Run it: gradacc lessons batch_norm. The doctor finds: examples_coupled.
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
    """Return the gradient of 64 examples in micro-batches of `size`, and the first example after the norm."""
    model, normalised = new_model(norm), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model[1].register_forward_hook(lambda module, inputs, output: normalised.append(output[0]))
    for x, y in zip(X.split(size), Y.split(size), strict=True):
        (mse_loss(model(x), y) * size / 64).backward()
    optimizer.step()
    return parameters_to_vector(p.grad for p in model.parameters()), normalised[0]


def gradacc(norm, size):
    """Return the same gradient, computed with gradacc."""
    model = (accelerator := Accelerator(cpu=True)).prepare(new_model(norm))
    examples = [{"x": x, "labels": y} for x, y in zip(X, Y, strict=True)]
    for window in WindowLoader(examples, 64, micro_batch_size=size, shuffle=False, accelerator=accelerator):
        for batch in window:
            with accelerator.accumulate(model):
                accelerator.backward(window.weigh(mse_loss(model(batch["x"]), batch["labels"])))
    return parameters_to_vector(p.grad for p in model.parameters())


def main():
    def off(here, truth):
        return (torch.dist(here, truth) / truth.norm()).item()

    found = {}
    print("  micro-batch size      gradient error   in gradacc   first example's error")
    for norm in NORMS:
        (truth, example), errors = plain(norm, 64), []
        for size in (32, 16, 8, 4):
            gradient, row_here = plain(norm, size)
            errors.append((off(gradient, truth), off(gradacc(norm, size), truth), off(row_here, example)))
            print(f"{norm:<15} {size:2} {errors[-1][0]:19.0e} {errors[-1][1]:12.0e} {errors[-1][2]:22.0e}")
        found[norm] = torch.tensor(errors).T.tolist()  # errors: gradients, with gradacc, first example
    print("BatchNorm normalises an example by statistics of its micro-batch, the others by its own values.")
    print("In gradacc: `fine_tune` calls `preflight_check`, which warns of BatchNorm before the run.")
    return found


def draw(axes, found):
    for norm, errors in found.items():
        axes.semilogy((32, 16, 8, 4), errors[0], marker="o", label=norm)
    axes.set(title="Error of the gradient", xlabel="examples per micro-batch", ylabel="relative error")


if __name__ == "__main__":
    main()
