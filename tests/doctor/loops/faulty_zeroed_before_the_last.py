import torch
import torch.nn.functional as F
from tiny import loader, net

model, accum = net(), 4
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(2):
    for i, (x, y) in enumerate(loader()):
        loss = F.cross_entropy(model(x), y) / accum
        if (i + 1) % accum == 0:
            optimizer.zero_grad()  # fault: zeroed_inside_the_window
            loss.backward()
            optimizer.step()
        else:
            loss.backward()
