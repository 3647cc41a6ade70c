"""What happens to an example? A thousand examples pass through window, micro-batch, model, loss and step.

Run it: gradacc lessons pipeline_trace. The doctor finds: partial_window_leaked.
"""

import torch
from accelerate import Accelerator
from torch.nn.functional import cross_entropy
from torch.nn.utils import parameters_to_vector
from torch.utils.data import DataLoader, TensorDataset

from gradacc_hf import WindowLoader

torch.manual_seed(0)
X = torch.randn(1000, 10)
Y = (X @ torch.randn(10) + torch.randn(1000) > 0).long()
EXAMPLES = [{"x": x, "labels": y} for x, y in zip(X, Y, strict=True)]


def new_model():
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(10, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def plain(size, steps):  # gradients of batches that fill no window stay in .grad
    (model, optimizer), batches = new_model(), DataLoader(TensorDataset(X, Y), size)
    for _ in range(5):
        for i, (x, y) in enumerate(batches, start=1):
            (cross_entropy(model(x), y) / steps).backward()
            if i % steps == 0:
                optimizer.step()
                optimizer.zero_grad()
    print(f"plain: {i} batches of {size} per epoch, {i // steps} steps; {i % steps} batches fill no window")
    return parameters_to_vector(model.parameters()).detach()


def gradacc(found):
    model, optimizer = (accelerator := Accelerator(cpu=True)).prepare(*new_model())
    windows = WindowLoader(EXAMPLES, 16, micro_batch_size=4, shuffle=False, accelerator=accelerator)
    for epoch in range(5):
        found["loss"].append(0.0)
        for window in windows:
            for batch in window:
                with accelerator.accumulate(model):
                    accelerator.backward(window.weigh(cross_entropy(model(batch["x"]), batch["labels"])))
                    optimizer.step()
                    optimizer.zero_grad()
            found["loss"][epoch] += window.loss * len(window.indices) / len(X)
        found["accuracy"].append((model(X).argmax(1) == Y).float().mean().item())
    print(
        f"gradacc: {tuple(X.shape)} examples -> {len(windows)} windows, the last with {len(window.indices)}"
    )
    print(f"-> micro-batches {tuple(batch['x'].shape)} -> logits {tuple(model(batch['x']).shape)} -> loss ()")
    return model


def main():
    weights = {"plain": plain(4, 4), "at once": plain(16, 1)}
    model, h = gradacc(found := {"loss": [], "accuracy": []}), X[:1]
    for loss, accuracy in zip(*found.values(), strict=True):
        print(f"epoch: mean loss {loss:.4f}, then accuracy on the same examples {accuracy:.3f}")
    print(f"the first example: {[round(v, 2) for v in h[0].tolist()]}")
    for layer in (*model, torch.nn.Softmax(1)):
        h = layer(h)
        print(f"{type(layer).__name__:>8} -> {tuple(h.shape)} {[round(v, 2) for v in h[0].tolist()]}")
    print(f"-> class {int(h.argmax())}; its label is {int(Y[0])}")
    weights["gradacc"], truth = parameters_to_vector(model.parameters()), weights["at once"]
    found |= {name: (torch.dist(weights[name], truth) / truth.norm()).item() for name in ("plain", "gradacc")}
    print(f"error of the weights: plain {found['plain']:.0e}, gradacc {found['gradacc']:.0e}")
    print("In gradacc: `WindowLoader` makes a step of the last examples, which plain code leaks.")
    return found


def draw(axes, found):
    for name in ("loss", "accuracy"):
        axes.plot(range(1, 6), found[name], marker="o", label=name)
    axes.set(title="A thousand examples, 63 steps an epoch", xlabel="epoch", xticks=range(1, 6))


if __name__ == "__main__":
    main()
