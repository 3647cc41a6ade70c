import torch
import torch.nn.functional as F
from tiny import loader, net

model, steps = net(), 4
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
batches = loader()
cosine = torch.optim.lr_scheduler.CosineAnnealingLR
scheduler = cosine(optimizer, 2 * len(batches))  # fault: schedule_sized_in_micro_batches
for _ in range(2):
    for step, (x, y) in enumerate(batches, start=1):
        loss = F.cross_entropy(model(x), y)
        loss.backward()  # fault: not_divided
        if step % steps == 0:
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
