import torch
import torch.nn.functional as F
from tiny import loader, net

model, steps = net(), 4
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
for _ in range(2):
    for step, (x, y) in enumerate(loader(), start=1):
        loss = F.cross_entropy(model(x), y)
        loss.backward()  # fault: not_divided
        if step % steps == 0:
            torch.nn.utils.clip_grad_value_(model.parameters(), 0.01)
            optimizer.step()
            optimizer.zero_grad()
