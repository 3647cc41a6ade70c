import torch
import torch.nn.functional as F
from tiny import loader, net


class Classifier(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = net(8), net(3, inputs=8)

    def forward(self, x):
        return self.second(F.dropout(self.first(x), 0.3, self.training))


model, steps, batches = Classifier(), 4, loader()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(2):
    for step, (x, y) in enumerate(batches, start=1):
        (F.cross_entropy(model(x), y) / steps).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)  # fault: clipped_too_early
        if step % steps == 0:
            optimizer.step()
            optimizer.zero_grad()
