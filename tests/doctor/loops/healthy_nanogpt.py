import math

import torch
import torch.nn.functional as F
from tiny import Tagger


class GPT(Tagger):
    def forward(self, idx, targets=None):
        logits = super().forward(idx)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)


def get_batch():
    x = torch.randint(20, (4, 8))
    return x, (x + 1) % 5


def get_lr(it):
    return 1e-3 * 0.5 * (1 + math.cos(math.pi * it / 8))


model, gradient_accumulation_steps, iter_num = GPT(), 4, 0
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
scaler = torch.amp.GradScaler("cpu", enabled=False)
X, Y = get_batch()
while True:
    for group in optimizer.param_groups:
        group["lr"] = get_lr(iter_num)
    for _micro_step in range(gradient_accumulation_steps):
        logits, loss = model(X, Y)
        loss = loss / gradient_accumulation_steps
        X, Y = get_batch()
        scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    iter_num += 1
    if iter_num > 6:
        break
