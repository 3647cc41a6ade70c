import torch
import torch.nn.functional as F
from tiny import Tagger, tokens


class FGM:
    def __init__(self, model):
        self.model, self.backup = model, {}

    def attack(self, epsilon=1.0, name="embed"):
        for n, p in self.model.named_parameters():
            if p.requires_grad and name in n:
                self.backup[n] = p.data.clone()
                norm = torch.norm(p.grad)
                if norm != 0:
                    p.data.add_(epsilon * p.grad / norm)

    def restore(self):
        for n, p in self.model.named_parameters():
            if n in self.backup:
                p.data = self.backup[n]
        self.backup = {}


model = Tagger()
fgm, optimizer = FGM(model), torch.optim.AdamW(model.parameters(), lr=2e-3)
for window in tokens(unequal=False):
    for ids, labels in window:
        loss = F.cross_entropy(model(ids).flatten(0, 1), labels.flatten()) / len(window)
        loss.backward()
        fgm.attack()
        loss_adv = F.cross_entropy(model(ids).flatten(0, 1), labels.flatten()) / len(window)
        loss_adv.backward()
        fgm.restore()
    optimizer.step()
    optimizer.zero_grad()
