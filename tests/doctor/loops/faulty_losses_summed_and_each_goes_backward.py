import torch
import torch.nn.functional as F
from tiny import loader, net

model, accum, total = net(), 4, 0.0
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
for _ in range(2):
    for i, (x, y) in enumerate(loader(), start=1):
        total = total + F.cross_entropy(model(x), y) / accum
        total.backward(retain_graph=True)  # fault: another_gradient
        if i % accum == 0:
            optimizer.step()
            optimizer.zero_grad()
            total = 0.0
