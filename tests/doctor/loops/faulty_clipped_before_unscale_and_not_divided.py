import torch
import torch.nn.functional as F
from tiny import loader, net

model, accum = net(), 4
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
for _ in range(2):
    for i, (x, y) in enumerate(loader(), start=1):
        scaler.scale(F.cross_entropy(model(x), y)).backward()  # fault: not_divided
        if i % accum == 0:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # fault: clipped_while_scaled
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
