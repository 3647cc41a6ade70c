import torch
import torch.nn.functional as F
from tiny import net, rows

model, steps, (x, y) = net().bfloat16(), 64, rows(256)
optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
for _ in range(3):
    for some, kind in zip(x.bfloat16().split(4), y.split(4), strict=True):
        (F.cross_entropy(model(some), kind) / steps).backward()
    optimizer.step()  # fault: swamped_in_16_bits
    optimizer.zero_grad()
