import torch
import torch.nn.functional as F
from tiny import loader, net

model, steps = net(), 4
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
teacher = net().eval()
for _ in range(2):
    for step, (x, y) in enumerate(loader(), start=1):
        logits = model(x)
        soft = F.kl_div(logits.log_softmax(-1), teacher(x).detach().softmax(-1), reduction="batchmean")
        loss = 0.5 * F.cross_entropy(logits, y) + 0.5 * 2.0**2 * soft
        loss.backward()  # fault: not_divided
        if step % steps == 0:
            optimizer.step()
            optimizer.zero_grad()
