import torch
import torch.nn.functional as F
from tiny import net, rows

model, steps, size, (x, y) = net(), 4, 8, rows(100)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(3):
    for step, first in enumerate(range(0, len(x), size), start=1):
        loss = F.cross_entropy(model(x[first : first + size]), y[first : first + size])
        (loss / steps).backward()
        if step % steps == 0:
            optimizer.step()  # fault: partial_window_leaked
            optimizer.zero_grad()
