import torch
import torch.nn.functional as F
from tiny import loader, net

model, steps = net(), 4
model[0].requires_grad_(False)
optimizer = torch.optim.SGD(model[2].parameters(), lr=0.1)
for epoch in range(3):
    if epoch == 1:
        model[0].requires_grad_(True)
        optimizer.add_param_group({"params": model[0].parameters(), "lr": 0.01})
    for step, (x, y) in enumerate(loader(16), start=1):
        (F.cross_entropy(model(x), y) / steps).backward()
        if step % steps == 0:
            optimizer.step()
            optimizer.zero_grad()
