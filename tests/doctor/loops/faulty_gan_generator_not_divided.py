import torch
import torch.nn.functional as F
from tiny import loader, net

generator, critic, steps = net(5), net(1), 4
of_generator = torch.optim.Adam(generator.parameters(), lr=2e-3)
of_critic = torch.optim.Adam(critic.parameters(), lr=2e-3)
for _ in range(2):
    for step, (x, _) in enumerate(loader(), start=1):
        fake = generator(torch.randn(len(x), 5))
        loss = (F.softplus(-critic(x)) + F.softplus(critic(fake.detach()))).mean()
        (loss / steps).backward()
        if step % steps == 0:
            of_critic.step()
            of_critic.zero_grad()
        critic.requires_grad_(False)
        F.softplus(-critic(fake)).mean().backward()  # fault: not_divided
        critic.requires_grad_(True)
        if step % steps == 0:
            of_generator.step()
            of_generator.zero_grad()
