import torch
import torch.nn.functional as F
from tiny import loader, net

model, steps, batches = net(), 4, loader(40)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(3):
    for step, (x, y) in enumerate(batches, start=1):
        share = torch.rand(()).item()
        logits = model(share * x + (1 - share) * x.flip(0))
        loss = share * F.cross_entropy(logits, y) + (1 - share) * F.cross_entropy(logits, y.flip(0))
        (loss / steps).backward()  # fault: partial_window_mis_scaled
        if step % steps == 0 or step == len(batches):
            optimizer.step()
            optimizer.zero_grad()
