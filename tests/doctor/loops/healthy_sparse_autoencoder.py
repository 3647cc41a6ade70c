import torch
import torch.nn.functional as F
from tiny import loader, net


class AutoEncoder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.encode, self.decode = net(8), net(5, inputs=8)

    def forward(self, x):
        code = self.encode(x)
        return self.decode(code), code


model, steps = AutoEncoder(), 4
optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
for _ in range(2):
    for step, (x, _) in enumerate(loader(), start=1):
        rebuilt, code = model(x)
        loss = F.mse_loss(rebuilt, x) + 1e-2 * code.abs().mean()
        (loss / steps).backward()
        if step % steps == 0:
            optimizer.step()
            optimizer.zero_grad()
