import torch
import torch.nn.functional as F
from tiny import Tagger, tokens

model = Tagger()
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
for window in tokens():
    total = sum((labels != -100).sum() for _, labels in window)
    for ids, labels in window:
        mask = (labels != -100).float()
        each = F.cross_entropy(model(ids).transpose(1, 2), labels.clamp(min=0), reduction="none")
        ((each * mask).sum() / total).backward()
    optimizer.step()
    optimizer.zero_grad()
