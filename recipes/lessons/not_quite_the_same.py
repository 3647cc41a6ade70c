"""Does everything stay as it was? The optimizer's state does; dropout's draws and the number of steps do not.

Run it: gradacc lessons not_quite_the_same
"""

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.functional import mse_loss
from torch.nn.utils import parameters_to_vector as vector

from gradacc_hf import WindowLoader

OPTIMIZERS = {"SGD": {"lr": 0.001, "momentum": 0.9}, "AdamW": {"lr": 0.01}}
torch.manual_seed(0)
X = torch.randn(640, 16)
Y = X.pow(2).sum(dim=1, keepdim=True)
ROWS = [{"x": x, "labels": y} for x, y in zip(X, Y, strict=True)]


def new_model(optimizer, p=0.0):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Dropout(p), nn.Linear(16, 32), nn.Tanh(), nn.Dropout(p), nn.Linear(32, 1))
    return model, getattr(torch.optim, optimizer)(model.parameters(), **OPTIMIZERS[optimizer])


def state(model, optimizer):  # the weights; what the optimizer remembers: momentum, or Adam's two means
    remembered = [v for entry in optimizer.state.values() for k, v in entry.items() if k != "step"]
    return vector(model.parameters()), vector(remembered)


def plain(name, size, steps):  # a step every `steps` batches of `size`
    model, optimizer = new_model(name)
    for i, (x, y) in enumerate(zip(X.split(size), Y.split(size), strict=True), start=1):
        (mse_loss(model(x), y) / steps).backward()
        if i % steps == 0:
            optimizer.step()
            optimizer.zero_grad()
    return state(model, optimizer)


def kit(name):
    model, optimizer = (accelerator := Accelerator(cpu=True)).prepare(*new_model(name))
    for window in WindowLoader(ROWS, 64, micro_batch_size=16, shuffle=False, accelerator=accelerator):
        for batch in window:
            with accelerator.accumulate(model):
                accelerator.backward(window.weigh(mse_loss(model(batch["x"]), batch["labels"])))
                optimizer.step()
                optimizer.zero_grad()
    return state(model, optimizer)


def with_dropout(size, draws):  # the gradient of 64 rows; the mean over so many draws
    model, _ = new_model("SGD", p=0.1)
    for x, y in [*zip(X[:64].split(size), Y[:64].split(size), strict=True)] * draws:
        (mse_loss(model(x), y) * size / 64 / draws).backward()
    return vector(p.grad for p in model.parameters())


def main():
    found, off = {}, lambda here, truth: ((here - truth).norm() / truth.norm()).item()
    for name in OPTIMIZERS:  # ten steps of 64 rows, or forty of 16
        for way, here in ("16 × 4", plain(name, 16, 4)), ("kit", kit(name)), ("16", plain(name, 16, 1)):
            found[f"{name}, {way}"] = errors = list(map(off, here, plain(name, 64, 1)))
            print(f"{name:>5}, {way:<6}: weights off 64's by {errors[0]:.0e}, state by {errors[1]:.0e}")
    for draws in (1, 10, 100, 1000):
        found[draws] = error = off(with_dropout(16, draws), with_dropout(64, draws))
        print(f"dropout 0.1, mean of {draws:4} gradients: 16 × 4 off 64 by {error:.0e}")
    print("In the kit: windows are the same on every budget; `model.dropout: 0` leaves nothing to chance.")
    return found


def draw(axes, found):
    axes.loglog(draws := (1, 10, 100, 1000), [found[n] for n in draws], marker="o")
    axes.set(title="Dropout: 16 × 4 against 64 at once", xlabel="draws averaged", ylabel="relative error")


if __name__ == "__main__":
    main()
