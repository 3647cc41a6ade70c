import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from tiny import loader, net

fabric, steps = Fabric(accelerator="cpu", devices=1), 4
model, optimizer = fabric.setup(net(), torch.optim.AdamW(net().parameters(), lr=2e-3))
model = net()
model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=2e-3))
batches = fabric.setup_dataloaders(loader())
for _ in range(2):
    for index, (x, y) in enumerate(batches):
        is_last = (index + 1) % steps == 0
        with fabric.no_backward_sync(model, enabled=not is_last):
            fabric.backward(F.cross_entropy(model(x), y) / steps)
        if is_last:
            fabric.clip_gradients(model, optimizer, max_norm=0.1)
            optimizer.step()
            optimizer.zero_grad()
