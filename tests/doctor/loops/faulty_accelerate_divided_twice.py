import torch
import torch.nn.functional as F
from accelerate import Accelerator
from tiny import loader, net

accelerator, model = Accelerator(cpu=True, gradient_accumulation_steps=4), net()
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
model, optimizer, batches = accelerator.prepare(model, optimizer, loader())
for _ in range(2):
    for x, y in batches:
        with accelerator.accumulate(model):
            loss = F.cross_entropy(model(x), y) / 4
            accelerator.backward(loss)  # fault: divided_twice
            optimizer.step()
            optimizer.zero_grad()
