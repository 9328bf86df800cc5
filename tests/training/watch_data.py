"""A training that writes down which samples it is given: FOLDER LOG PROCESSES KEY=VALUE…, to be launched as well."""

import hashlib
import json
import sys
from pathlib import Path

import torch
import yaml
from torch import nn

from rfsr_ext.training import Loop, Method, RunConfig
from rfsr_ext.training.setup import build_dataset


def fingerprint(sample) -> str:
    """Of everything that a sample holds."""
    digest = hashlib.sha256(sample["prompt"].encode())
    for key in ("gt", "lr"):
        digest.update(f"{key}{sample[key].dtype}{list(sample[key].shape)}".encode())
        digest.update(sample[key].contiguous().numpy().tobytes())
    return digest.hexdigest()


class Watch(Method):
    """Nothing is learned; every sample of every batch becomes a line of a file of this process."""

    def __init__(self, log: Path):
        self.network, self.log = nn.Linear(1, 1), log
        nn.init.ones_(self.network.weight), nn.init.ones_(self.network.bias)  # the same at every start
        self.players = {"model": {"net": self.network}}

    def install(self, player, networks):
        self.network = networks["net"]

    def loss(self, player, batch, iteration, samples):
        for k, index in enumerate(samples):
            sample = {key: batch[key][k] for key in ("gt", "lr", "prompt")}
            with self.log.open("a") as file:
                file.write(json.dumps([index, fingerprint(sample)]) + "\n")
        loss = self.network(torch.ones(1, 1)).square().mean()
        return loss, {"loss": loss.detach()}

    def export(self, folder):
        folder.mkdir(parents=True, exist_ok=True)


def main(folder, log, processes, *settings):
    values = {key: yaml.safe_load(value) for key, value in (pair.split("=", 1) for pair in settings)}
    config = RunConfig(output_dir=folder, checkpoint_every=1, **values)
    loop = Loop(config, Watch(Path(f"{log}-placeholder")), build_dataset(config))
    assert loop.accelerator.num_processes == int(processes)
    loop.method.log = Path(f"{log}-{loop.accelerator.process_index}")
    loop.train()
    if int(processes) > 1:
        assert torch.distributed.get_world_size() == int(processes)


if __name__ == "__main__":
    main(*sys.argv[1:])
