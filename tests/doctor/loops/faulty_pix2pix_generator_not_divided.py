import torch
from tiny import loader, net

generator, critic, steps = net(5), net(1, inputs=10), 4
adversarial, pixels = torch.nn.BCEWithLogitsLoss(), torch.nn.L1Loss()
of_generator = torch.optim.Adam(generator.parameters(), lr=2e-4, betas=(0.5, 0.999))
of_critic = torch.optim.Adam(critic.parameters(), lr=2e-4, betas=(0.5, 0.999))
for _ in range(2):
    for step, (x, _) in enumerate(loader(), start=1):
        wanted = x.flip(1)
        fake = generator(x)
        for parameter in critic.parameters():
            parameter.requires_grad_(True)
        on_fake = critic(torch.cat([x, fake.detach()], 1))
        on_real = critic(torch.cat([x, wanted], 1))
        loss_fake = adversarial(on_fake, torch.zeros_like(on_fake))
        loss_real = adversarial(on_real, torch.ones_like(on_real))
        ((loss_fake + loss_real) * 0.5 / steps).backward()
        if step % steps == 0:
            of_critic.step()
            of_critic.zero_grad()
        for parameter in critic.parameters():
            parameter.requires_grad_(False)
        on_fake = critic(torch.cat([x, fake], 1))
        loss = adversarial(on_fake, torch.ones_like(on_fake)) + 100 * pixels(fake, wanted)
        loss.backward()  # fault: not_divided
        if step % steps == 0:
            of_generator.step()
            of_generator.zero_grad()
