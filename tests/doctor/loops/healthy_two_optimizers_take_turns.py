import torch
import torch.nn.functional as F
from tiny import loader, net

model, steps, turn = net(), 3, 0
optimizers = [
    torch.optim.SGD(model[0].parameters(), lr=0.1),
    torch.optim.SGD(model[2].parameters(), lr=0.1),
]
for _ in range(2):
    for step, (x, y) in enumerate(loader(), start=1):
        (F.cross_entropy(model(x), y) / steps).backward()
        if step % steps == 0:
            optimizers[turn % 2].step()
            model.zero_grad()
            turn += 1
