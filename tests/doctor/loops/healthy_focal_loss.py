import torch
import torch.nn.functional as F
from tiny import loader, net


class FocalLoss(torch.nn.Module):
    def forward(self, logits, target):
        each = F.cross_entropy(logits, target, reduction="none")
        return ((1 - (-each).exp()) ** 2 * each).mean()


model, steps, criterion = net(), 4, FocalLoss()
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
for _ in range(2):
    for step, (x, y) in enumerate(loader(), start=1):
        (criterion(model(x), y) / steps).backward()
        if step % steps == 0:
            optimizer.step()
            optimizer.zero_grad()
