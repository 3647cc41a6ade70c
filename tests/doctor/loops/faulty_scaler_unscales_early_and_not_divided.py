import torch
import torch.nn.functional as F
from tiny import loader, net

model, steps = net(), 4
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
for _ in range(2):
    for step, (x, y) in enumerate(loader(), start=1):
        scaler.scale(F.cross_entropy(model(x), y)).backward()  # fault: not_divided
        scaler.unscale_(optimizer)  # fault: unscaled_too_early
        if step % steps == 0:
            scaler.step(optimizer)
            optimizer.zero_grad()
        scaler.update()
