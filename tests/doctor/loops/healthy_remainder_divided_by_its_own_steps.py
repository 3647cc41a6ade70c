import torch
import torch.nn.functional as F
from tiny import loader, net

model, steps, batches = net(), 4, loader(40)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(2):
    for index, (x, y) in enumerate(batches):
        left = len(batches) - index // steps * steps
        (F.cross_entropy(model(x), y) / min(steps, left)).backward()
        if (index + 1) % steps == 0 or index + 1 == len(batches):
            optimizer.step()
            optimizer.zero_grad()
