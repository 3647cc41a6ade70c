import torch
import torch.nn.functional as F
from tiny import loader, net

model, steps = net(), 4
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
for _ in range(2):
    for step, (x, y) in enumerate(loader(40), start=1):
        loss = F.cross_entropy(model(x), y)
        loss.backward()  # fault: not_divided
        if step % steps == 0:
            optimizer.step()  # fault: partial_window_leaked
            optimizer.zero_grad()
