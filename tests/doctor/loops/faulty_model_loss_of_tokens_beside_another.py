import torch
import torch.nn.functional as F
from tiny import Tagger, tokens


class Model(Tagger):
    def forward(self, ids, labels):
        logits = super().forward(ids)
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


model = Model()
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
for window in tokens():
    for ids, labels in window:
        out = model(ids, labels)
        loss = out["loss"] + 0.01 * out["logits"].pow(2).mean()
        (loss / len(window)).backward()  # fault: mean_of_means
    optimizer.step()
    optimizer.zero_grad()
