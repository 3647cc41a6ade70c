import torch
import torch.nn.functional as F
from tiny import loader, net
from torch import nn

body, head_a, head_b = net(outputs=8), nn.Linear(8, 3), nn.Linear(8, 1)
model, accum = nn.ModuleList([body, head_a, head_b]), 4
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
for _ in range(2):
    for i, (x, y) in enumerate(loader(), start=1):
        h = body(x)
        l1 = F.cross_entropy(head_a(h), y) / accum
        l2 = F.mse_loss(head_b(h)[:, 0], y.float()) / accum
        torch.autograd.backward([l1, l2])
        if i % accum == 0:
            optimizer.step()
            optimizer.zero_grad()
