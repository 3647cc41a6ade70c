import torch
from tiny import loader, net

generator, critic, steps = net(5), net(1), 4
criterion = torch.nn.BCEWithLogitsLoss()
of_generator = torch.optim.Adam(generator.parameters(), lr=2e-3)
of_critic = torch.optim.Adam(critic.parameters(), lr=2e-3)
for _ in range(2):
    batches = list(loader())
    for first in range(0, len(batches), steps):
        window = [x for x, _ in batches[first : first + steps]]
        of_critic.zero_grad()
        for x in window:
            with torch.no_grad():
                fake = generator(torch.randn(len(x), 5))
            real_loss = criterion(critic(x), torch.ones(len(x), 1))
            fake_loss = criterion(critic(fake), torch.zeros(len(x), 1))
            ((real_loss + fake_loss) / 2 / steps).backward()
        of_critic.step()
        of_generator.zero_grad()
        for x in window:
            fake = generator(torch.randn(len(x), 5))
            (criterion(critic(fake), torch.ones(len(x), 1)) / steps).backward()
        of_generator.step()
