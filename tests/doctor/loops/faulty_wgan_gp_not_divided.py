import torch
from tiny import loader, net

generator, critic, steps = net(5), net(1), 3
of_critic = torch.optim.Adam(critic.parameters(), lr=2e-3)
for _ in range(2):
    for step, (x, _) in enumerate(loader(), start=1):
        fake = generator(torch.randn(len(x), 5)).detach()
        mixed = ((x + fake) / 2).requires_grad_(True)
        (slope,) = torch.autograd.grad(critic(mixed).sum(), mixed, create_graph=True)
        penalty = ((slope.norm(2, dim=1) - 1) ** 2).mean()
        loss = critic(fake).mean() - critic(x).mean() + 10 * penalty
        loss.backward()  # fault: not_divided
        if step % steps == 0:
            of_critic.step()
            of_critic.zero_grad()
