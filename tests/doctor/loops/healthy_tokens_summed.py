import torch
import torch.nn.functional as F
from tiny import Tagger, tokens

model = Tagger()
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
for window in tokens():
    total = sum(int((labels != -100).sum()) for _, labels in window)
    for ids, labels in window:
        logits = model(ids)
        loss = F.cross_entropy(logits.view(-1, 5), labels.view(-1), reduction="sum") / total
        loss.backward()
    optimizer.step()
    optimizer.zero_grad()
