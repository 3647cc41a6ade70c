"""May bf16 weights accumulate in bf16? No: each micro-batch adds an error. In float32 it does not.

Run it: gradacc lessons bf16_weights. The doctor finds: swamped_in_16_bits.
"""

import torch
from accelerate import Accelerator
from torch.nn.functional import mse_loss
from torch.nn.utils import parameters_to_vector

from gradacc_hf import WindowLoader, accumulate_in_float32

STEPS = (1, 4, 16, 64, 256)  # micro-batches in a window of 256 examples
torch.manual_seed(0)
X = torch.randn(256, 32)
Y = X.sum(dim=1, keepdim=True)


def new_model(dtype=torch.bfloat16):
    """Return a model whose weights are rounded to bf16 and have the same values in any format."""
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1))
    return model.bfloat16().to(dtype)


def plain(steps, dtype=torch.bfloat16, accumulate=None):
    """Return the window's gradient in plain PyTorch, summed in the weights' format or in `accumulate`."""
    model, total = new_model(dtype), 0.0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for x, y in zip(X.chunk(steps), Y.chunk(steps), strict=True):
        (mse_loss(model(x.to(dtype)).float(), y) / steps).backward()
        if accumulate is not None:
            total += parameters_to_vector(p.grad for p in model.parameters()).to(accumulate)
            model.zero_grad()
    if accumulate is not None:
        return total
    optimizer.step()
    return parameters_to_vector(p.grad for p in model.parameters())


def gradacc(steps):
    """Return the same with gradacc: `.grad` is float32, and is rounded to bf16 at the optimizer's step."""
    model, seen = new_model(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    accumulate_in_float32(model, optimizer)
    model, optimizer = (accelerator := Accelerator(cpu=True)).prepare(model, optimizer)
    examples = [{"x": x, "labels": y} for x, y in zip(X.bfloat16(), Y, strict=True)]
    settings = {"micro_batch_size": 256 // steps, "shuffle": False, "accelerator": accelerator}
    for window in WindowLoader(examples, 256, **settings):
        for batch in window:
            with accelerator.accumulate(model):
                loss = mse_loss(model(batch["x"]).float(), batch["labels"])
                accelerator.backward(window.weigh(loss))
                if accelerator.sync_gradients:
                    seen.append(parameters_to_vector(p.grad for p in model.parameters()))
                optimizer.step()
                optimizer.zero_grad()
    return seen[0]


def main():
    truth, found = plain(1, torch.float32), {"in bf16": [], "in float32": [], "in gradacc": []}
    print("accumulation steps   in bf16   in float32   in gradacc")
    for steps in STEPS:
        gradients = plain(steps), plain(steps, accumulate=torch.float32), gradacc(steps)
        for errors, gradient in zip(found.values(), gradients, strict=True):
            errors.append((torch.dist(gradient.float(), truth) / truth.norm()).item())
        print(f"{steps:18}" + "".join(f"{errors[-1]:11.2%}" for errors in found.values()))
    print("In gradacc: `accumulate_in_float32`, which `fine_tune` calls. In a recipe: `--model.dtype`.")
    return found


def draw(axes, found):
    for name, errors in found.items():
        axes.plot([str(steps) for steps in STEPS], errors, marker="o", label=name)
    axes.set(title="Error of a window's gradient", xlabel="accumulation steps", ylabel="relative error")
    axes.yaxis.set_major_formatter("{x:.1%}")
    axes.set_ylim(0)


if __name__ == "__main__":
    main()
