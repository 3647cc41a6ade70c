import torch
import torch.nn.functional as F
from tiny import loader, net

model, accum = net(), 4
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
for _ in range(2):
    for i, (x, y) in enumerate(loader(), start=1):
        loss = F.cross_entropy(model(x), y)
        loss.backward(gradient=torch.ones_like(loss))  # fault: not_divided
        if i % accum == 0:
            optimizer.step()
            optimizer.zero_grad()
