"""Two processes, launched with the configuration files of ``docs/accelerate``, do what one does and share the work."""

import json
import re
import socket

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType
from PIL import Image

from rfsr_ext.files import load_tensors
from rfsr_ext.training.loop import create_accelerator
from tests import launching, tiny, together
from tests.training import toy

HALF = together.ITERATIONS // 2
FILES = sorted(path.name for path in launching.CONFIGURATIONS.iterdir())


def test_the_page_links_every_configuration():
    page = (launching.ROOT / "docs/many_gpus.md").read_text()
    assert sorted(set(re.findall(r"\]\(accelerate/(\w+\.yaml)\)", page))) == FILES
    assert "docs/many_gpus.md" in (launching.ROOT / "README.md").read_text()


@pytest.mark.parametrize("name", FILES)
def test_accelerate_reads_it(name):
    """By its own loader, and no key is one that the launcher would pass over."""
    path = launching.CONFIGURATIONS / name
    config = load_config_from_file(str(path))
    assert config.distributed_type == (DistributedType.FSDP if "fsdp" in name else DistributedType.MULTI_GPU)
    assert config.num_machines == (2 if "two_machines" in name else 1)
    options = vars(launch_command_parser().parse_args(["--config_file", str(path), "script.py"]))
    assert set(config.fsdp_config) <= set(options)
    (command,) = re.findall(r"^#   (accelerate launch .+)$", path.read_text(), re.MULTILINE)
    typed = launch_command_parser().parse_args(command.split()[2:])
    assert typed.config_file == f"docs/accelerate/{name}" and typed.module and typed.training_script == "rfsr_ext"


@pytest.mark.parametrize("engine", ["DEEPSPEED", "MEGATRON_LM"])
def test_engines_with_optimizers_of_their_own_are_refused(tmp_path, monkeypatch, engine):
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    with pytest.raises(ValueError, match=rf"must be MULTI_GPU, or FSDP \(version 2\), .*got {engine}; see docs/many"):
        create_accelerator(toy.config(tmp_path))


def prepare_commands(folder):
    """A model, five LR images of which one is broken, and their ground truths."""
    tiny.tiny_model(num_inference_steps=2).save_pretrained(folder / "model")
    rng = np.random.default_rng(0)
    for name in "abcde":
        for kind, side in (("lr", 8), ("gt", 32)):
            (folder / kind).mkdir(exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).save(folder / kind / f"{name}.png")
    (folder / "lr/b.png").write_bytes((folder / "lr/b.png").read_bytes()[:80])


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """Everything that the two processes do, done by this one."""
    folder = tmp_path_factory.mktemp("one")
    together.train_tiny(folder / "tiny", together.ITERATIONS)
    together.train_two_players(folder / "toy", together.ITERATIONS)
    together.train_two_players(folder / "bf16", together.ITERATIONS, mixed_precision="bf16")
    prepare_commands(folder / "commands")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WATCH", str(folder / "made-"))
        together.run_commands(folder / "commands")
    return folder


def assert_same_run(one, two):
    """The same curves, the same state, and whole weights in what is exported."""
    curves = [pd.read_csv(folder / "history.csv").drop(columns="seconds") for folder in (one, two)]
    assert len(curves[0]) == together.ITERATIONS and curves[0].columns.equals(curves[1].columns)
    pd.testing.assert_frame_equal(*curves, rtol=1e-4, atol=1e-6)
    (a, about_a), (b, about_b) = (
        load_tensors(folder / f"checkpoints/iteration-{together.ITERATIONS:06d}.safetensors") for folder in (one, two)
    )
    assert a.keys() == b.keys() and about_a["iteration"] == about_b["iteration"]
    for name in a:
        torch.testing.assert_close(
            b[name], a[name], rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
    paths = list((one / "model").rglob("*.safetensors"))
    assert paths
    for path in paths:
        exported = [load_tensors(folder / path.relative_to(one))[0] for folder in (one, two)]
        for name, tensor in exported[0].items():
            torch.testing.assert_close(exported[1][name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("configuration", ["ddp.yaml", "fsdp2.yaml"])
def test_two_processes_do_what_one_does(tmp_path, monkeypatch, one, configuration):
    """RFSR and a method of two players: begun by two and ended by one, and the other way round; then all commands."""
    together.train_tiny(tmp_path / "tiny-begun", HALF)
    together.train_two_players(tmp_path / "toy-begun", HALF)
    if configuration == "ddp.yaml":
        prepare_commands(tmp_path / "commands")
    monkeypatch.setenv("WATCH", str(tmp_path / "made-"))
    process = launching.start(configuration, together.__file__, tmp_path, configuration)
    printed = launching.ended_well(process)
    assert {path.name for path in tmp_path.glob("ended-*")} == {"ended-0", "ended-1"}
    assert not (tmp_path / "elsewhere/config.json").exists()
    together.train_tiny(tmp_path / "tiny", together.ITERATIONS)
    together.train_two_players(tmp_path / "toy", together.ITERATIONS)
    for name in ("tiny", "toy"):
        assert_same_run(one / name, tmp_path / name)
        assert_same_run(one / name, tmp_path / f"{name}-begun")
    if configuration == "ddp.yaml":
        assert_shared(one, tmp_path, printed)
    else:
        curves = [pd.read_csv(folder / "bf16/history.csv").drop(columns="seconds") for folder in (one, tmp_path)]
        pd.testing.assert_frame_equal(*curves, rtol=2e-2)
        exact = pd.read_csv(one / "toy/history.csv")
        assert (curves[1]["generator/loss"] - exact["generator/loss"]).abs().max() > 1e-4  # it was bf16


def assert_shared(one, two, printed):
    """Each picture was made once, by either; files are those of one process to the byte; tables are printed once."""
    alone, first, second = (
        [tuple(json.loads(line)) for line in path.read_text().splitlines()]
        for path in (one / "made-0", two / "made-0", two / "made-1")
    )
    assert sorted(first + second) == sorted(alone) and len(set(alone)) == len(alone) == 12
    for command in {command for command, _ in alone}:
        assert [command in dict(part) for part in (first, second)] == [True, True]
    files = [
        {path.relative_to(folder): path.read_bytes() for path in (folder / "commands").rglob("*") if path.is_file()}
        for folder in (one, two)
    ]
    for kept in files:
        (lock,) = [path for path in kept if path.name == ".rfsr.lock"]  # holds the number of a process
        del kept[lock]
    assert files[0] == files[1] and sum(path.suffix == ".csv" for path in files[0]) == 4
    assert printed.count("mean ± standard error over pictures") == 3 and printed.count("1 held-out crops of") == 1


@pytest.mark.slow
def test_two_machines(tmp_path, one):
    """As far as one can be two: a launcher for each, which meet at an address, and a process of each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    machines = [
        launching.start(
            "ddp_two_machines.yaml", toy.__file__, tmp_path, together.ITERATIONS, 2,
            options=("--machine_rank", rank, "--main_process_ip", "127.0.0.1", "--main_process_port", port),
        )
        for rank in range(2)
    ]  # fmt: skip
    for machine in machines:
        launching.ended_well(machine)
    assert {path.name for path in tmp_path.glob("ended-*")} == {"ended-0", "ended-1"}
    assert_same_run(one / "toy", tmp_path)
