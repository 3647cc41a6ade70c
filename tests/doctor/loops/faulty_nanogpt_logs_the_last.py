import torch
import torch.nn.functional as F
from tiny import Tagger


class GPT(Tagger):
    def forward(self, idx, targets=None):
        logits = super().forward(idx)
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))


model = GPT()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for step in range(5):
    optimizer.zero_grad()
    for _micro_step in range(4):
        x = torch.randint(20, (4, 8))
        logits, loss = model(x, (x + 1) % 5)
        loss = loss / 4
        loss.backward()
    optimizer.step()
    print(f"{step} {loss.item():.4f}")  # fault: logged_loss_of_the_last_micro_batch
