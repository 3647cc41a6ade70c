import torch
import torch.nn.functional as F
from tiny import Tagger, tokens

model = Tagger()
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
for window in tokens(unequal=False):
    for ids, labels in window:
        loss = F.cross_entropy(model(ids).flatten(0, 1), labels.flatten())
        loss.backward()  # fault: not_divided
        p = model.embed.weight
        saved = p.data.clone()
        p.data.add_(p.grad / p.grad.norm())
        loss_adv = F.cross_entropy(model(ids).flatten(0, 1), labels.flatten())
        loss_adv.backward()
        p.data = saved
    optimizer.step()
    optimizer.zero_grad()
