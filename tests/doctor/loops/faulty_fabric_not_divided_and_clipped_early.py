import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from tiny import loader, net

fabric, steps, model = Fabric(accelerator="cpu", devices=1), 4, net()
model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=2e-3))
batches = fabric.setup_dataloaders(loader())
for _ in range(2):
    for index, (x, y) in enumerate(batches):
        fabric.backward(F.cross_entropy(model(x), y))  # fault: not_divided
        fabric.clip_gradients(model, optimizer, max_norm=0.1)  # fault: clipped_too_early
        if (index + 1) % steps == 0:
            optimizer.step()
            optimizer.zero_grad()
