"""What happens to a row? A thousand of them, followed through window, micro-batch, model, loss and step.

Run it: gradacc lessons pipeline_trace
"""

import torch
from accelerate import Accelerator
from torch.nn.functional import cross_entropy
from torch.nn.utils import parameters_to_vector

from gradacc_hf import WindowLoader

torch.manual_seed(0)
X = torch.randn(1000, 10)
Y = (X @ torch.randn(10) + torch.randn(1000) > 0).long()
ROWS = [{"x": x, "labels": y} for x, y in zip(X, Y, strict=True)]


def new_model():
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(10, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def plain(size, steps):  # batches that do not fill a window stay in .grad
    model, optimizer = new_model()
    for _ in range(5):
        for i, (x, y) in enumerate(zip(X.split(size), Y.split(size), strict=True), start=1):
            (cross_entropy(model(x), y) / steps).backward()
            if i % steps == 0:
                optimizer.step()
                optimizer.zero_grad()
    return parameters_to_vector(model.parameters()).detach()


def kit(found):
    """The same five epochs through the kit."""
    model, optimizer = (accelerator := Accelerator(cpu=True)).prepare(*new_model())
    windows = WindowLoader(ROWS, 16, micro_batch_size=4, shuffle=False, accelerator=accelerator)
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
    print(f"{tuple(X.shape)} rows → {len(windows)} windows of 16, the last of {len(window.indices)}")
    print(f"→ micro-batches {tuple(batch['x'].shape)} → logits {tuple(model(batch['x']).shape)} → loss ()")
    return model


def main():
    model, h = kit(found := {"loss": [], "accuracy": []}), X[:1]
    print(f"The first row: {[round(v, 1) for v in h[0].tolist()]}, label {int(Y[0])}")
    for layer in (*model, torch.nn.Softmax(1)):
        h = layer(h)
        print(f"{type(layer).__name__:>8} → {tuple(h.shape)} {[round(v, 1) for v in h[0].tolist()]}")
    for epoch, loss, accuracy in zip(range(1, 6), *found.values(), strict=True):
        print(f"epoch {epoch}: loss {loss:.4f}, accuracy {accuracy:.3f}")
    truth = plain(16, 1)  # 63 steps an epoch, each at once
    for name, weights in (("kit", parameters_to_vector(model.parameters())), ("plain", plain(4, 4))):
        found[name] = ((weights - truth).norm() / truth.norm()).item()
    print(f"Weights off steps of 16 rows at once: kit {found['kit']:.0e}, plain {found['plain']:.0e},")
    print("where 250 batches of 4 leave 2 over, which leak into the next epoch's first step.")
    print("In the kit: `WindowLoader` makes windows of what there is; the last one is a step of its own.")
    return found


def draw(axes, found):
    for name in ("loss", "accuracy"):
        axes.plot(range(1, 6), found[name], marker="o", label=name)
    axes.set(title="A thousand rows, 63 steps an epoch", xlabel="epoch", xticks=range(1, 6))


if __name__ == "__main__":
    main()
