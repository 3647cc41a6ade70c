import torch
import torch.nn.functional as F
from tiny import loader, net
from torch.optim.lr_scheduler import CosineAnnealingLR


class Engine:
    def __init__(self, model, config):
        self.module, self.gas = model, config["gradient_accumulation_steps"]
        self.clip = config["gradient_clipping"]
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=config["lr"])
        self.scheduler = CosineAnnealingLR(self.optimizer, 6)
        self.micro_steps = 0

    def __call__(self, *args):
        return self.module(*args)

    def is_gradient_accumulation_boundary(self):
        return (self.micro_steps + 1) % self.gas == 0

    def backward(self, loss):
        loss = loss / self.gas
        loss.backward()
        return loss

    def step(self):
        if self.is_gradient_accumulation_boundary():
            torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.clip)
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
        self.micro_steps += 1


engine = Engine(net(), {"gradient_accumulation_steps": 4, "gradient_clipping": 0.5, "lr": 3e-3})
for _epoch in range(2):
    for x, y in loader():
        loss = F.cross_entropy(engine(x), y)
        engine.backward(loss)
        engine.step()
