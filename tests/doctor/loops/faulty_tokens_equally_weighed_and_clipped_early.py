import torch
import torch.nn.functional as F
from tiny import Tagger, tokens

model = Tagger()
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
for window in tokens():
    for ids, labels in window:
        loss = F.cross_entropy(model(ids).flatten(0, 1), labels.flatten())
        (loss / len(window)).backward()  # fault: mean_of_means
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)  # fault: clipped_too_early
    optimizer.step()
    optimizer.zero_grad()
