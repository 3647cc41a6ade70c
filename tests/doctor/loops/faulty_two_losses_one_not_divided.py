import torch
import torch.nn.functional as F
from tiny import loader, net

model, steps = net(), 4
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
beside = net(1)
optimizer.add_param_group({"params": beside.parameters()})
for _ in range(2):
    for step, (x, y) in enumerate(loader(), start=1):
        (F.cross_entropy(model(x), y) / steps).backward()
        loss = F.mse_loss(beside(x), x[:, :1]) + F.cross_entropy(model(x), y)
        loss.backward()  # fault: not_divided
        if step % steps == 0:
            optimizer.step()
            optimizer.zero_grad()
