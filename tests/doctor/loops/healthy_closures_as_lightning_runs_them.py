import torch
import torch.nn.functional as F
from tiny import loader, net

model, steps = net(), 4
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
for _ in range(2):
    for index, (x, y) in enumerate(loader()):

        def closure(x=x, y=y, index=index):
            loss = F.cross_entropy(model(x), y)
            if index % steps == 0:
                optimizer.zero_grad()
            (loss / steps).backward()
            return loss

        if (index + 1) % steps:
            closure()
        else:
            optimizer.step(closure)
