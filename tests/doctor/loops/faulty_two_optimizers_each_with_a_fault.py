import torch
import torch.nn.functional as F
from tiny import loader, net

model, steps = net(), 4
first = torch.optim.AdamW(model[0].parameters(), lr=2e-3)
second = torch.optim.SGD(model[2].parameters(), lr=0.1)
scheduler = torch.optim.lr_scheduler.ExponentialLR(second, 0.9)
for _ in range(2):
    for step, (x, y) in enumerate(loader(), start=1):
        F.cross_entropy(model(x), y).backward()  # fault: not_divided
        torch.nn.utils.clip_grad_norm_(model[0].parameters(), 0.01)  # fault: clipped_too_early
        scheduler.step()  # fault: scheduler_per_micro_batch
        if step % steps == 0:
            for optimizer in (first, second):
                optimizer.step()
                optimizer.zero_grad()
