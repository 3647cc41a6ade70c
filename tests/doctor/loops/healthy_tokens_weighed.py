import torch
import torch.nn.functional as F
from tiny import Tagger, tokens

model = Tagger()
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
for window in tokens():
    total = sum((labels != -100).sum() for _, labels in window)
    for ids, labels in window:
        loss = F.cross_entropy(model(ids).flatten(0, 1), labels.flatten())
        (loss * (labels != -100).sum() / total).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
