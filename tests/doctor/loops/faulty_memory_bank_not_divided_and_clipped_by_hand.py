import torch
import torch.nn.functional as F
from tiny import loader, net

model, steps, batches = net(8), 4, loader()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
bank = F.normalize(torch.randn(32, 8), dim=1)
for _ in range(2):
    for step, (x, _) in enumerate(batches, start=1):
        anchor = F.normalize(model(x), dim=1)
        positive = F.normalize(x.repeat(1, 2)[:, :8], dim=1)
        scores = torch.cat([(anchor * positive).sum(1, keepdim=True), anchor @ bank.T], dim=1)
        loss = F.cross_entropy(scores / 0.2, torch.zeros(len(x), dtype=torch.long))
        loss.backward()  # fault: not_divided
        norm = sum(p.grad.pow(2).sum() for p in model.parameters()).sqrt()
        for p in model.parameters():
            p.grad.mul_(0.05 / norm)  # fault: clipped_too_early
        if step % steps == 0:
            optimizer.step()
            optimizer.zero_grad()
