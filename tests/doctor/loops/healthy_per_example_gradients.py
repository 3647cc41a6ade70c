import torch
import torch.nn.functional as F
from tiny import loader, net
from torch.func import functional_call, grad, vmap

model, steps = net(), 4
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}


def loss_of(weights, x, y):
    return F.cross_entropy(functional_call(model, weights, (x[None],)), y[None])


for _ in range(2):
    for step, (x, y) in enumerate(loader(), start=1):
        weights = {name: p.detach() for name, p in model.named_parameters()}
        for name, each in vmap(grad(loss_of), (None, 0, 0))(weights, x, y).items():
            total[name] += each.clamp(-0.1, 0.1).sum(0)
        if step % steps == 0:
            for name, p in model.named_parameters():
                p.grad = total[name] / 16
                total[name] = torch.zeros_like(p)
            optimizer.step()
