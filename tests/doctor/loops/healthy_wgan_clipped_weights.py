import torch
from tiny import loader, net

generator, critic, rounds = net(5), net(1), 2
of_generator = torch.optim.RMSprop(generator.parameters(), lr=5e-4)
of_critic = torch.optim.RMSprop(critic.parameters(), lr=5e-4)
for _ in range(2):
    for step, (x, _) in enumerate(loader(), start=1):
        of_critic.zero_grad()
        fake = generator(torch.randn(len(x), 5)).detach()
        loss = critic(fake).mean() - critic(x).mean()
        loss.backward()
        of_critic.step()
        for p in critic.parameters():
            p.data.clamp_(-0.1, 0.1)
        if step % rounds == 0:
            of_generator.zero_grad()
            (-critic(generator(torch.randn(len(x), 5))).mean()).backward()
            of_generator.step()
