import torch
from tiny import loader, net

generator, critic, steps = net(5), net(1), 3
of_generator = torch.optim.Adam(generator.parameters(), lr=2e-3)
of_critic = torch.optim.Adam(critic.parameters(), lr=2e-3)


def penalty(real, fake):
    share = torch.rand(len(real), 1)
    mixed = (share * real + (1 - share) * fake).requires_grad_(True)
    (slope,) = torch.autograd.grad(critic(mixed).sum(), mixed, create_graph=True)
    return ((slope.norm(2, dim=1) - 1) ** 2).mean()


for _ in range(2):
    batches = [x for x, _ in loader()]
    for first in range(0, len(batches), steps):
        of_critic.zero_grad()
        for x in batches[first : first + steps]:
            fake = generator(torch.randn(len(x), 5)).detach()
            loss = critic(fake).mean() - critic(x).mean() + 10 * penalty(x, fake)
            (loss / steps).backward()
        of_critic.step()
        of_generator.zero_grad()
        for x in batches[first : first + steps]:
            (-critic(generator(torch.randn(len(x), 5))).mean() / steps).backward()
        of_generator.step()
