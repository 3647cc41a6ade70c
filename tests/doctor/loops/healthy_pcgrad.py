import random

import torch
import torch.nn.functional as F
from tiny import loader, net
from torch import nn

body, head_a, head_b = net(outputs=8), nn.Linear(8, 3), nn.Linear(8, 3)
model = nn.ModuleList([body, head_a, head_b])
optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)


def pc_backward(objectives):
    grads = []
    for objective in objectives:
        optimizer.zero_grad()
        objective.backward(retain_graph=True)
        grads.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()])
    flat = [torch.cat([g.flatten() for g in some]) for some in grads]
    projected = [g.clone() for g in flat]
    for g in projected:
        random.shuffle(flat)
        for other in flat:
            inner = torch.dot(g, other)
            if inner < 0:
                g -= inner * other / other.norm() ** 2
    merged, at = torch.stack(projected).mean(0), 0
    for p in model.parameters():
        p.grad = merged[at : at + p.numel()].view_as(p).clone()
        at += p.numel()


for _ in range(2):
    for x, y in loader():
        h = torch.tanh(body(x))
        losses = [F.cross_entropy(head_a(h), y), F.cross_entropy(head_b(h), (y + 1) % 3)]
        pc_backward(losses)
        optimizer.step()
