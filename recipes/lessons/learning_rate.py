"""What learning rate for an effective batch four times as large? Unchanged, × √4, × 4, × 4 with warm-up.

Run it: gradacc lessons learning_rate. The doctor finds: nothing.
"""

import torch
from accelerate import Accelerator
from torch.nn.functional import cross_entropy

from gradacc_hf import WindowLoader

EPOCHS = 6
WAYS = {"16, lr": (16, 1, 0), "64, lr": (64, 1, 0), "64, lr × sqrt 4": (64, 2, 0), "64, lr × 4": (64, 4, 0)}
WAYS["64, lr × 4, warm-up"] = (64, 4, 32)
torch.manual_seed(0)
X = torch.randn(1024, 20)
Y = (torch.tanh(X @ torch.randn(20, 4)) @ torch.randn(4) > 0).long()


def new_model(seed, lr, warmup):
    """Return a small network, SGD, and a learning rate that rises to `lr` over `warmup` steps."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.Tanh(), torch.nn.Linear(64, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    return model, optimizer, torch.optim.lr_scheduler.LinearLR(optimizer, 1 / (warmup + 1), 1, warmup)


def plain(seed, size, lr, warmup=0):
    """Return the mean loss of each epoch, with one batch per window. All sizes use the same examples."""
    (model, optimizer, scheduler), losses = new_model(seed, lr, warmup), []
    for _ in range(EPOCHS):
        for x, y in zip(X.split(size), Y.split(size), strict=True):
            losses.append(loss := cross_entropy(model(x), y))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
    return torch.stack(losses).detach().view(EPOCHS, -1).mean(dim=1)


def gradacc(seed, size, lr, warmup=0):  # the same in micro-batches of 16
    (model, optimizer, scheduler), losses = new_model(seed, lr, warmup), []
    model, optimizer = (accelerator := Accelerator(cpu=True)).prepare(model, optimizer)
    examples = [{"x": x, "labels": y} for x, y in zip(X, Y, strict=True)]
    windows = WindowLoader(examples, size, micro_batch_size=16, shuffle=False, accelerator=accelerator)
    for _ in range(EPOCHS):
        for window in windows:
            for batch in window:
                with accelerator.accumulate(model):
                    accelerator.backward(window.weigh(cross_entropy(model(batch["x"]), batch["labels"])))
                    optimizer.step()
                    optimizer.zero_grad()
            scheduler.step()
            losses.append(window.loss)
    return torch.tensor(losses).view(EPOCHS, -1).mean(dim=1)


def main():
    found = {}
    for lr in (0.1, 1.0):
        for name, (size, factor, warmup) in WAYS.items():
            losses = torch.stack([plain(seed, size, lr * factor, warmup) for seed in range(5)])
            found[name.replace("lr", str(lr))] = losses.mean(0).tolist()
            print(f"lr {lr}: {name:<19} loss by epoch", *(f"{loss:.3f}" for loss in losses.mean(0)), end="")
            print(f" ± {losses[:, -1].std():.3f} (5 seeds)")
    found["error"] = (gradacc(0, 64, 0.4) - plain(0, 64, 0.4)).abs().max().item()
    print(f"With gradacc, 16 × 4 has the losses of 64, to {found['error']:.0e}.")
    print("In gradacc: `batch.effective` and `optim.lr` hold on any budget, so tune them once.")
    return found


def draw(axes, found):
    for i, name in enumerate(list(found)[:-1]):  # the same colour for the same way
        axes.plot(range(1, EPOCHS + 1), found[name], color=f"C{i % 5}", ls=("-", ":")[i // 5], label=name)
    axes.set(title="Examples per step, and learning rate", xlabel="epoch", ylabel="loss", yscale="log")


if __name__ == "__main__":
    main()
