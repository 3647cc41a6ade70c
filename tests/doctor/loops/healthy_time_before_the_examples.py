import torch
import torch.nn.functional as F


class Predictor(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = torch.nn.GRU(5, 8), torch.nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.body(x)[0])


torch.manual_seed(0)
model, steps = Predictor(), 3
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(6):
    for _ in range(steps):
        x = torch.randn(7, 4, 5)
        (F.mse_loss(model(x), x.roll(-1, 0)) / steps).backward()
    optimizer.step()
    optimizer.zero_grad()
