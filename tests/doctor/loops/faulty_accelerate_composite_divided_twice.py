import torch
import torch.nn.functional as F
from accelerate import Accelerator
from tiny import loader, net

accelerator, model = Accelerator(cpu=True, gradient_accumulation_steps=3), net()
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
model, optimizer, batches = accelerator.prepare(model, optimizer, loader())
for _ in range(2):
    for x, y in batches:
        with accelerator.accumulate(model):
            logits = model(x)
            loss = F.cross_entropy(logits, y) + 0.4 * logits.abs().mean()
            accelerator.backward(loss / 3)  # fault: divided_twice
            optimizer.step()
            optimizer.zero_grad()
