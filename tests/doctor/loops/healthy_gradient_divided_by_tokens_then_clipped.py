import torch
import torch.nn.functional as F
from tiny import Tagger, tokens

model = Tagger()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for window in tokens():
    seen = 0
    for ids, labels in window:
        F.cross_entropy(model(ids).flatten(0, 1), labels.flatten(), reduction="sum").backward()
        seen += int((labels != -100).sum())
    for p in model.parameters():
        p.grad.data.div_(seen)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
    optimizer.step()
    model.zero_grad()
