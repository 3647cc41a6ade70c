import torch
import torch.nn.functional as F
from tiny import loader, net

model, accum = net(), 4
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _epoch in range(2):
    for i, (x, y) in enumerate(loader()):
        loss = F.cross_entropy(model(x), y) / accum
        loss.backward()  # fault: partial_window_mis_scaled
        if i % accum == 0:
            optimizer.step()  # fault: partial_window_leaked
            optimizer.zero_grad()
