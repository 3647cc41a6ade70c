import torch
import torch.nn.functional as F
from tiny import loader, net

model, steps = net(8), 4
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(2):
    for step, (x, y) in enumerate(loader(), start=1):
        alike = F.cosine_similarity(model(x), model(x.flip(1)))
        loss = F.mse_loss(alike, (y > 0).float())
        (loss / steps).backward()
        if step % steps == 0:
            optimizer.step()
            optimizer.zero_grad()
