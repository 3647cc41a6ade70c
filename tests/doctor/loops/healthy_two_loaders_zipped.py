import torch
import torch.nn.functional as F
from tiny import loader, net

model, steps = net(), 4
labelled, unlabelled = loader(), loader(48, 8)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(2):
    for step, ((x, y), (u, _)) in enumerate(zip(labelled, list(unlabelled) * 2, strict=True), start=1):
        guess = model(u).softmax(-1)
        loss = F.cross_entropy(model(x), y) + 0.1 * (guess * guess.log()).sum(-1).mean()
        (loss / steps).backward()
        if step % steps == 0:
            optimizer.step()
            optimizer.zero_grad()
