import torch
import torch.nn.functional as F
from tiny import loader, net

model, steps = net(), 4
first = torch.optim.AdamW(model[0].parameters(), lr=2e-3)
second = torch.optim.SGD(model[2].parameters(), lr=0.1)
for _ in range(2):
    for step, (x, y) in enumerate(loader(), start=1):
        (F.cross_entropy(model(x), y) / steps).backward()
        if step % steps == 0:
            first.step()
            second.step()  # fault: never_zeroed
            first.zero_grad()
