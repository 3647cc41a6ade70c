import torch
import torch.nn.functional as F
from tiny import Tagger, tokens

model = Tagger()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for window in tokens():
    for ids, labels in window:
        out = model(ids)
        losses = F.cross_entropy(out.flatten(0, 1), labels.flatten(), reduction="sum")
        loss = losses / (labels != -100).sum() / len(window)
        loss.backward()  # fault: mean_of_means
    optimizer.step()
    optimizer.zero_grad()
