import torch
import torch.nn.functional as F
from tiny import SAM, loader, net

model = net()
optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
for _ in range(2):
    for x, y in loader():

        def closure(x=x, y=y):
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        loss = closure()
        optimizer.step(closure)
        optimizer.zero_grad()
