"""An adversarial method of two players on numbers instead of images, and the same in a process of its own."""

import sys
from pathlib import Path

import torch
from torch import nn

from rfsr_ext.files import save_tensors
from rfsr_ext.training import Loop, Method, RunConfig


class Numbers(torch.utils.data.Dataset):
    """Points on a line, each a function of its index."""

    def __len__(self):
        return 100_000

    def __getitem__(self, index):
        x = torch.randn(2, generator=torch.Generator().manual_seed(index))
        return {"x": x, "y": 2 * x + 1}


class ToyGAN(Method):
    """A generator that maps x to y, and a discriminator that tells (x, y) from (x, G(x))."""

    def __init__(self):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.generator = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
            self.discriminator = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        self.players = {"discriminator": {"net": self.discriminator}, "generator": {"net": self.generator}}
        self.seen = 0

    def install(self, player, networks):
        setattr(self, player, networks["net"])

    def loss(self, player, batch, iteration, samples):
        z = torch.stack([torch.randn(2, generator=torch.Generator().manual_seed(1_000_000 + i)) for i in samples])
        made = self.generator(torch.cat([batch["x"], z], dim=1))
        score = self.discriminator(torch.cat([batch["x"], made if player == "generator" else made.detach()], dim=1))
        if player == "generator":
            loss = nn.functional.softplus(-score).mean() + (made - batch["y"]).square().mean()
        else:
            real = self.discriminator(torch.cat([batch["x"], batch["y"]], dim=1))
            loss = (nn.functional.softplus(score) + nn.functional.softplus(-real)).mean()
            self.seen += len(samples)
        return loss, {"loss": loss.detach()}

    def optimizer(self, player, parameters, config):
        if player == "generator":
            return super().optimizer(player, parameters, config)
        return torch.optim.AdamW(parameters, config.learning_rate, betas=config.adam_betas)

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]

    def export(self, folder):
        save_tensors(folder / "generator.safetensors", self.generator.state_dict())


def config(folder, **changes):
    values = {"iterations": 30, "batch_size": 4, "learning_rate": 1e-2, "ema_decay": 0.5, "checkpoint_every": 1}
    return RunConfig(**values | {"output_dir": str(folder)} | changes)


def main(folder, iterations, processes=1):
    loop = Loop(config(folder, iterations=int(iterations)), ToyGAN(), Numbers())
    assert loop.accelerator.num_processes == int(processes)
    loop.train()
    if int(processes) > 1:
        assert torch.distributed.get_world_size() == int(processes)
        Path(folder, f"ended-{torch.distributed.get_rank()}").touch()


if __name__ == "__main__":
    main(*sys.argv[1:])
