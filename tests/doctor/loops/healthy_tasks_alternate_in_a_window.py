import torch
from tiny import loader, net
from torch import nn

body = net(outputs=8)
heads = nn.ModuleDict({"a": nn.Linear(8, 3), "b": nn.Linear(8, 1)})
model = nn.ModuleDict({"body": body, "heads": heads})
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
loaders = {"a": loader(), "b": loader()}
steps, micro = 4, 0
for (xa, ya), (xb, yb) in zip(loaders["a"], loaders["b"], strict=False):
    for task, x, y in (("a", xa, ya), ("b", xb, yb)):
        out = heads[task](body(x))
        if task == "a":
            loss = nn.functional.cross_entropy(out, y)
        else:
            loss = nn.functional.mse_loss(out.squeeze(-1), y.float())
        (loss / steps).backward()
        micro += 1
        if micro % steps == 0:
            optimizer.step()
            optimizer.zero_grad()
