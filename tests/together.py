"""What two processes do together, launched by `accelerate launch`: FOLDER CONFIGURATION.

Each asserts that it is one of two and, where networks are cut, that it holds a part of every parameter only; the files
that are left are compared with those of one process by ``test_many_processes.py``.
"""

import contextlib
import hashlib
import importlib
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.tensor import DTensor

import rfsr_ext.cli
from rfsr_ext.processes import process_state, split_map
from rfsr_ext.training import Loop
from tests.training import toy
from tests.training.run_tiny import make_trainer

ITERATIONS = 4


def train_tiny(folder: Path, iterations: int, cut: bool = False, **changes):
    """RFSR with a U-Net and a ControlNet; of two processes each takes its half of a batch along its trajectory."""
    trainer = make_trainer(folder, iterations, 4, **changes)
    for state in trainer.loop.states.values():
        # Adam's first step is a gradient's sign: of one of 1e-10, which two halves of a batch round differently, it
        # would turn a weight by the whole learning rate.
        state.optimizer.param_groups[0]["eps"] = 1e-6
    networks = trainer.model.trainable_networks()
    if cut:
        assert_cut(*networks.values())
    seen = set()
    networks["unet"].register_forward_pre_hook(lambda network, inputs: seen.add(len(inputs[0])))
    result = trainer.train()
    assert max(seen) == 4 // trainer.loop.accelerator.num_processes  # held-out images are two
    return result


def train_two_players(folder: Path, iterations: int, cut: bool = False, **changes):
    method = toy.ToyGAN()
    loop = Loop(toy.config(folder, iterations=iterations, **changes), method, toy.Numbers())
    if cut:
        assert_cut(method.generator, method.discriminator)
    return loop.train()


class Brightest:
    """A tagger: the brightest channel."""

    def __call__(self, images):
        watch("tag", images[0])
        return [("red", "green", "blue")[k] for k in images.mean((2, 3)).argmax(1)]


def watch(command: str, image: torch.Tensor) -> None:
    """Write down that this process did this picture."""
    digest = hashlib.sha256(image.contiguous().numpy().tobytes()).hexdigest()
    with open(os.environ["WATCH"] + os.environ.get("RANK", "0"), "a") as file:
        file.write(json.dumps([command, digest]) + "\n")


def run_commands(folder: Path, main: bool = True) -> None:
    """All commands that are split, in a folder that has ``model``, ``lr`` with a broken ``b.png``, and ``gt``."""
    pairs = ("evaluate", "model", "--pairs", "lr", "gt", "--metrics", "psnr,ssim", "--output", "pairs.csv")
    commands = {
        ("upscale", "lr", "--model", "model"): "rfsr: 1 of 5 files could not be upscaled: lr/b.png",
        ("data", "tag", "lr", "--tagger", "tests.together:Brightest"): "rfsr: 1 pictures could not be read; the reas",
        pairs: "rfsr: 1 pictures of the pairs were left out: lr/b.png",
        (*pairs[:-1], "again.csv"): "rfsr: 1 pictures of the pairs were left out: lr/b.png",  # nothing is made anew
        ("evaluate", "upscaled", "--gt", "gt", "--metrics", "psnr,ssim", "--output", "folder.csv"): "",
        ("evaluate", "model", "--crops", "1", "--seeds", "1", "--output", "crops.csv"): "",  # by the main one alone
    }
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(folder):
        for name in ("rfsr_ext.cli.upscale", "rfsr_ext.evaluation.pairs"):
            module = importlib.import_module(name)

            def watched(model, image, *arguments, name=name, original=module.upscale, **options):
                watch(name, image)
                return original(model, image, *arguments, **options)

            patch.setattr(module, "upscale", watched)
        for arguments, sentence in commands.items():
            patch.setattr("sys.argv", ["rfsr", *arguments])
            with pytest.raises(SystemExit) as stopped:
                rfsr_ext.cli.app()
            assert str(stopped.value.code or "").startswith(sentence) if main else not stopped.value.code


def assert_cut(*networks: nn.Module) -> None:
    """Each parameter is cut over processes, and of all that they hold about half is here."""
    parameters = [parameter for network in networks for parameter in network.parameters()]
    assert parameters and all(isinstance(parameter, DTensor) for parameter in parameters)
    mine = sum(parameter.to_local().numel() for parameter in parameters)
    assert 0.3 < mine / sum(parameter.numel() for parameter in parameters) < 0.7


def cut_on_cpus(mixed_precision: str) -> None:
    """accelerate cuts networks on accelerators only: on CPUs it leaves its FSDP plugin aside without a word, as
    ``AcceleratorState.__init__`` (1.15, state.py) does not list MULTI_CPU among the types that may become FSDP, and our
    loop then refuses.  The networks' part, `torch.distributed.fsdp.fully_shard`, works with gloo.  So the state is set
    by hand here, from the launcher's environment as accelerate does it; everything after it is what a run on GPUs does.
    """
    AcceleratorState._reset_state()
    process_state().distributed_type = DistributedType.MULTI_CPU
    with pytest.raises(ValueError, match="FSDP must be of version 2 and on GPUs, got version 2 on cpu"):
        train_two_players(Path("nowhere"), 1, mixed_precision=mixed_precision)
    assert AcceleratorState().distributed_type == DistributedType.MULTI_CPU  # else the lines below may go
    process_state().distributed_type = DistributedType.FSDP
    AcceleratorState().fsdp_plugin = FullyShardedDataParallelPlugin()
    assert AcceleratorState().is_fsdp2 and AcceleratorState().mixed_precision == mixed_precision


def main(folder: str, configuration: str) -> None:
    root, cut = Path(folder), configuration == "fsdp2.yaml"
    if cut:
        cut_on_cpus("bf16")
        AcceleratorState().fsdp_plugin.auto_wrap_policy = None  # it names layers that these networks do not have
        train_two_players(root / "bf16", ITERATIONS, cut, mixed_precision="bf16")
        cut_on_cpus("no")
    train_tiny(root / "tiny", ITERATIONS - 2, cut)
    train_tiny(root / "tiny-begun", ITERATIONS, cut)
    if cut:
        AcceleratorState().fsdp_plugin.auto_wrap_policy = None
    train_two_players(root / "toy", ITERATIONS - 2, cut)
    train_two_players(root / "toy-begun", ITERATIONS, cut)
    rank = torch.distributed.get_rank()
    assert torch.distributed.get_world_size() == 2
    with pytest.raises(RuntimeError, match="must be on a disk that all machines share, .*different iterations there"):
        train_two_players(root / ("toy" if rank == 0 else "elsewhere"), ITERATIONS)
    if not cut:
        run_commands(root / "commands", main=rank == 0)
        with pytest.raises(
            RuntimeError, match="all 2 processes must see the same files, and they see 2 different lists"
        ):
            list(split_map(str, [rank]))
    (root / f"ended-{rank}").touch()


if __name__ == "__main__":
    main(*sys.argv[1:])
