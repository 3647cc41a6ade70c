import torch
from tiny import loader, net

generator, critic, criterion = net(5), net(1), torch.nn.BCEWithLogitsLoss()
of_generator = torch.optim.Adam(generator.parameters(), lr=2e-4)
of_critic = torch.optim.Adam(critic.parameters(), lr=2e-4)
for _ in range(2):
    for x, _ in loader():
        critic.zero_grad()
        real = torch.ones(len(x), 1)
        criterion(critic(x), real).backward()
        fake = generator(torch.randn(len(x), 5))
        criterion(critic(fake.detach()), torch.zeros(len(x), 1)).backward()
        of_critic.step()
        generator.zero_grad()
        criterion(critic(fake), real).backward()
        of_generator.step()
