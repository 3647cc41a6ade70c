import torch
import torch.nn.functional as F
from tiny import loader, net

encoder, head, steps = net(8), net(3, inputs=8), 4
of_encoder = torch.optim.AdamW(encoder.parameters(), lr=2e-3)
of_head = torch.optim.SGD(head.parameters(), lr=0.1)
for _ in range(2):
    for step, (x, y) in enumerate(loader(), start=1):
        logits = head(encoder(x))
        (F.cross_entropy(logits, y) / steps).backward()
        if step % steps == 0:
            of_encoder.step()
            of_head.step()
            of_encoder.zero_grad()
            of_head.zero_grad()
