import torch
import torch.nn.functional as F
from tiny import loader, net

model, steps, batches = net(), 4, loader(40)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
for _ in range(2):
    optimizer.zero_grad()
    for step, (x, y) in enumerate(batches, start=1):
        loss = F.cross_entropy(model(x), y)
        loss.backward()  # fault: not_divided, partial_window_dropped
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)  # fault: clipped_too_early
        scheduler.step()  # fault: scheduler_per_micro_batch
        if step % steps == 0:
            optimizer.step()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)  # fault: clipped_too_late
            optimizer.zero_grad()
            print(loss.item())  # fault: logged_loss_of_the_last_micro_batch
