import torch
import torch.nn.functional as F

torch.manual_seed(0)
series, steps = torch.randn(49, 4, 5), 4
model = torch.nn.GRU(5, 5)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(2):
    state = None
    for step, first in enumerate(range(0, 48, 4), start=1):
        output, state = model(series[first : first + 4], state)
        state = state.detach()
        (F.mse_loss(output, series[first + 1 : first + 5]) / steps).backward()
        if step % steps == 0:
            optimizer.step()
            optimizer.zero_grad()
