import torch
import torch.nn.functional as F
from tiny import loader, net

model, steps = net(), 4
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
running = 0.0
for _ in range(2):
    for step, (x, y) in enumerate(loader(), start=1):
        loss = F.cross_entropy(model(x), y) / steps
        loss.backward()
        running += steps * loss.detach()
        if step % steps == 0:
            optimizer.step()
            optimizer.zero_grad()
            print(running.item())  # fault: logged_loss_inflated
            running = 0.0
