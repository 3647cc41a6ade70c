"""Does the rest of training stay the same? The optimizer's state, the number of steps, dropout.

Run it: gradacc lessons not_quite_the_same. The doctor finds: learning_rate_unchanged.
"""

import torch
from accelerate import Accelerator
from torch import nn

from gradacc_hf import WindowLoader

OPTIMIZERS = {"SGD": {"lr": 0.001, "momentum": 0.9}, "AdamW": {"lr": 0.01}}
X = torch.randn(640, 16, generator=torch.manual_seed(0))
Y = X.pow(2).sum(dim=1, keepdim=True)
EXAMPLES = [{"x": x, "labels": y} for x, y in zip(X, Y, strict=True)]


def new_model(optimizer, p=0.0):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Dropout(p), nn.Linear(16, 32), nn.Tanh(), nn.Dropout(p), nn.Linear(32, 1))
    return model, getattr(torch.optim, optimizer)(model.parameters(), **OPTIMIZERS[optimizer])


def state(model, optimizer):  # the weights and the optimizer's state: momentum, or Adam's two means
    remembered = [v for entry in optimizer.state.values() for v in entry.values() if v.dim()]
    return nn.utils.parameters_to_vector([*model.parameters(), *remembered])


def plain(name, size, steps):  # a step every `steps` batches of `size`
    model, optimizer = new_model(name)
    for i, (x, y) in enumerate(zip(X.split(size), Y.split(size), strict=True), start=1):
        (nn.functional.mse_loss(model(x), y) / steps).backward()
        if i % steps == 0:
            optimizer.step()
            optimizer.zero_grad()
    return state(model, optimizer), i // steps


def gradacc(name):
    model, optimizer = (accelerator := Accelerator(cpu=True)).prepare(*new_model(name))
    for window in WindowLoader(EXAMPLES, 64, micro_batch_size=16, shuffle=False, accelerator=accelerator):
        for batch in window:
            with accelerator.accumulate(model):
                accelerator.backward(window.weigh(nn.functional.mse_loss(model(batch["x"]), batch["labels"])))
                optimizer.step()
                optimizer.zero_grad()
    return state(model, optimizer), window.number + 1


def dropout_error(draws):  # of the gradient of 64 examples as 16 × 4, averaged over draws
    a, b = (new_model("SGD", p=0.1)[0] for _ in range(2))
    for model, size in ((a, 16), (b, 64)):
        for x, y in [*zip(X[:64].split(size), Y[:64].split(size), strict=True)] * draws:
            (nn.functional.mse_loss(model(x), y) * size / 64 / draws).backward()
    a, b = (nn.utils.parameters_to_vector(p.grad for p in model.parameters()) for model in (a, b))
    return (torch.dist(a, b) / b.norm()).item()


def main():
    found = {}
    for opt in OPTIMIZERS:
        ways = {"64": plain(opt, 64, 1), "16 × 4": plain(opt, 16, 4), "16": plain(opt, 16, 1)}
        for way, (here, steps) in (ways | {"gradacc": gradacc(opt)}).items():
            found[opt, way] = steps, (torch.dist(here, ways["64"][0]) / ways["64"][0].norm()).item()
            print(f"{opt:>5}, {way:<7}: {steps} steps; error of weights and state {found[opt, way][1]:.0e}")
    for draws in (1, 10, 100, 1000):
        found[draws] = dropout_error(draws)
        print(f"dropout 0.1, mean of {draws:4} gradients, 16 × 4 against 64: error {found[draws]:.0e}")
    print("In gradacc: windows are the same on every budget; `model.dropout: 0` turns dropout off.")
    return found


def draw(axes, found):
    axes.loglog(draws := (1, 10, 100, 1000), [found[n] for n in draws], marker="o")
    axes.set(title="Dropout: 16 × 4 against 64 at once", xlabel="draws averaged", ylabel="relative error")


if __name__ == "__main__":
    main()
