import torch
import torch.nn.functional as F
from tiny import loader, net

model, steps, labelled, unlabelled = net(), 4, loader(40), loader(40)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(3):
    for step, ((x, y), (u, _)) in enumerate(zip(labelled, unlabelled, strict=True), start=1):
        loss = F.cross_entropy(model(x), y) + 0.1 * model(u).pow(2).mean()
        (loss / steps).backward()
        if step % steps == 0:
            optimizer.step()  # fault: partial_window_leaked
            optimizer.zero_grad()
