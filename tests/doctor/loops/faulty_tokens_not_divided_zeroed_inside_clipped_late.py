import torch
import torch.nn.functional as F
from tiny import Tagger, tokens

model = Tagger()
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
for window in tokens(unequal=False):
    for ids, labels in window:
        model.zero_grad()  # fault: zeroed_inside_the_window
        loss = F.cross_entropy(model(ids).flatten(0, 1), labels.flatten())
        loss.backward()  # fault: not_divided
    optimizer.step()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)  # fault: clipped_too_late
