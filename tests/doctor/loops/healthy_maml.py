import torch
import torch.nn.functional as F
from tiny import net
from torch.func import functional_call

model, tasks = net(outputs=1), 4
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
for _ in range(5):
    optimizer.zero_grad()
    for _ in range(tasks):
        w = torch.randn(5)
        x, xq = torch.randn(6, 5), torch.randn(6, 5)
        fast = dict(model.named_parameters())
        inner = F.mse_loss(functional_call(model, fast, (x,))[:, 0], x @ w)
        grads = torch.autograd.grad(inner, list(fast.values()), create_graph=True)
        fast = {n: p - 0.05 * g for (n, p), g in zip(fast.items(), grads, strict=False)}
        outer = F.mse_loss(functional_call(model, fast, (xq,))[:, 0], xq @ w) / tasks
        outer.backward()
    optimizer.step()
