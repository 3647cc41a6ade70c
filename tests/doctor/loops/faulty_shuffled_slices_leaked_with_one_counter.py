import torch
import torch.nn.functional as F
from tiny import net, rows

model, steps, size, (x, y), step = net(), 4, 8, rows(100), 0
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(3):
    order = torch.randperm(len(x))
    for first in range(0, len(x), size):
        some = order[first : first + size]
        (F.cross_entropy(model(x[some]), y[some]) / steps).backward()
        step += 1
        if step % steps == 0:
            optimizer.step()  # fault: partial_window_leaked
            optimizer.zero_grad()
