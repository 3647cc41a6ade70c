"""Does half precision survive accumulation? bf16 and fp16 done right, and the usual mistakes.

Run it: gradacc lessons mixed_precision. The doctor finds: unscaled_too_early, clipped_while_scaled,
another_gradient, mis_scaled.
"""

import torch
from accelerate import Accelerator
from torch.nn.functional import mse_loss
from torch.nn.utils import clip_grad_norm_, parameters_to_vector

from gradacc_hf import WindowLoader

MAX_NORM, SCALE = 5e-6, 2.0**16  # below all norms here; GradScaler's initial scale
torch.manual_seed(0)
Y = (X := torch.randn(64, 32)).sum(dim=1, keepdim=True)


def new_model():
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1))
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def small_loss(outputs, y):
    return mse_loss(outputs.float(), y) * 1e-6  # as an auxiliary loss has: small gradients


def plain(dtype, size, scale=1.0, unscale=4):
    """Return the gradient of a step in plain PyTorch: scale, unscale once, clip, step, update."""
    model, optimizer = new_model()
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    for i, (x, y) in enumerate(zip(X.split(size), Y.split(size), strict=True), start=1):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = small_loss(model(x), y) * size / 64
        scaler.scale(loss).backward()
        if i == unscale:
            scaler.unscale_(optimizer)  # PyTorch allows it once per step
    clip_grad_norm_(model.parameters(), MAX_NORM)
    scaler.step(optimizer)  # unscales if that was not done; skips the step after an overflow
    scaler.update()
    return parameters_to_vector(p.grad for p in model.parameters())


def gradacc():
    """Return the gradient in bf16 with gradacc. fp16 needs a GPU: Accelerate uses float32 on a CPU."""
    model, optimizer = (accelerator := Accelerator(cpu=True, mixed_precision="bf16")).prepare(*new_model())
    examples = [{"x": x, "labels": y} for x, y in zip(X, Y, strict=True)]
    for window in WindowLoader(examples, 64, micro_batch_size=16, shuffle=False, accelerator=accelerator):
        for batch in window:
            with accelerator.accumulate(model):
                accelerator.backward(window.weigh(small_loss(model(batch["x"]), batch["labels"])))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), MAX_NORM)
                optimizer.step()
    return parameters_to_vector(p.grad for p in model.parameters())


def main():
    (truth, half), found = (plain(torch.float32, 64), torch.float16), {}
    gradients = {
        "float32": plain(torch.float32, 16),
        "bf16": plain(torch.bfloat16, 16),
        "bf16, gradacc": gradacc(),
    }
    gradients |= {"fp16": plain(half, 16, SCALE), "fp16, no scaler": plain(half, 16)}
    gradients["fp16, clipped while scaled"] = plain(half, 16, SCALE, unscale=None)
    gradients["fp16, unscaled after the first"] = plain(half, 16, SCALE, unscale=1)
    for name, gradient in gradients.items():
        found[name] = {"error": (torch.dist(gradient, truth) / truth.norm()).item()}
        found[name]["zeros"] = zeros = (gradient == 0).float().mean().item()
        print(f"{name:<31} error {found[name]['error']:.0e}, {zeros:3.0%} zeros, against float32 at once")
    print('In gradacc: `Accelerator(mixed_precision="bf16")`; "fp16" needs a GPU.')
    return found


def draw(axes, found):
    axes.barh(list(found), [way["error"] for way in found.values()])
    axes.invert_yaxis()
    axes.set(title="Error of a window's gradient", xlabel="relative error", xscale="log")


if __name__ == "__main__":
    main()
