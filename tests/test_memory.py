"""The memory count: against what autograd says it saves of real tensors, and against sizes known in closed form."""

import dataclasses

import pytest
import torch

from benchmarks import memory
from rfsr_ext.importing import import_object
from rfsr_ext.losses import VGGGramLoss
from rfsr_ext.models.catalog import PUBLISHED
from tests.models.released.reduced import REDUCED

TINY = {name: REDUCED[name] for name in memory.SYSTEMS if "," not in name}
TWO = ("C-SD2", "C-FLUX")  # where one of each architecture says enough


def test_what_lives_and_its_peak():
    """Of a chain of 1-MiB tensors two are alive at once, and those that a gradient needs stay."""
    x = torch.zeros(1 << 18, device="meta")
    with memory.Live() as live:
        for _ in range(5):
            x = x + 1
        view = x[1:].view(3, -1)[:, ::2]
    assert (live.now, live.peak) == (1 << 20, 2 << 20)
    del x
    assert live.now == 1 << 20  # the view holds it
    del view
    assert live.now == 0
    w = torch.zeros(1 << 18, device="meta", requires_grad=True)
    with memory.Live() as live:
        y = w.exp().exp().exp()  # each needs its own result
        assert live.now == 3 << 20
        y.sum().backward()
        del y
    assert live.now == w.grad.nbytes


def saved(call, known):
    """Bytes of what autograd saves of real tensors and of the result, each storage once, without known tensors."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), memory.as_on_gpu():
        keep(call())
    without = {tensor.untyped_storage()._cdata for tensor in known}
    return sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in without)


@pytest.mark.parametrize("name", TINY)
def test_activations_are_what_autograd_saves_of_real_tensors(name):
    real, shapes = (memory.prepare(TINY[name]().to(device)) for device in ("cpu", "meta"))
    found = memory.iteration(shapes, 2, 32)
    condition = real.condition(torch.rand(2, 3, 8, 8), ["", ""])
    latents = torch.rand(2, real.latent_channels, *[32 // real.vae_scale_factor] * 2)
    process = real.process(memory.steps_with_a_rollout(real), (32, 32))
    weights = [t for m in real.networks.values() for t in (*m.parameters(), *m.buffers())]
    inputs = [latents, *condition.spatial.values(), *condition.shared.values()]
    timestep = process.timesteps[-1]
    kept = saved(lambda: real.predict(latents, timestep, condition), [*weights, *inputs])
    # FLUX's rotary embeddings, a hundredth here, were made by the rollout before it, and are kept by diffusers
    assert found["denoiser"] == kept if name != "C-FLUX" else 0.99 * kept < found["denoiser"] < kept
    latents.requires_grad_()
    estimate = latents * 1
    assert found["decoder"] == saved(lambda: real.decode(estimate), [*weights, latents, estimate])


@pytest.mark.parametrize("name", TWO)
def test_what_is_held_beside_them(name):
    style = VGGGramLoss(weights="random").to("meta")
    model = memory.prepare(TINY[name]().to("meta"))
    trained = 4 * sum(p.numel() for p in model.trained_parameters().values())
    networks = sum(t.nbytes for m in model.networks.values() for t in (*m.parameters(), *m.buffers()))
    found = memory.iteration(model, 2, 32, style)
    assert (found["gradients"], found["Adam"], found["EMA"]) == (trained, 2 * trained, trained)
    whole = sum(t.nbytes for m in model.trainable_networks().values() for t in (*m.parameters(), *m.buffers()))
    assert (found["weights"], found["reference"]) == (networks, whole)
    held = sum(found[name] for name in ("weights", "Adam", "EMA", "reference"))
    assert found["peak"] > held + found["denoiser"] + found["decoder"] + found["style loss"]
    assert all(p.grad is None for p in model.trained_parameters().values())
    larger = memory.iteration(model, 4, 32, style)
    for part in ("denoiser", "decoder"):  # what does not grow with the batch is small
        assert 1.8 * found[part] < larger[part] <= 2 * found[part]


def test_adapters_need_no_reference():
    style = VGGGramLoss(weights="random").to("meta")
    model = memory.prepare(TINY["C-FLUX"]().to("meta"), rank=2)
    found = memory.iteration(model, 1, 32, style)
    adapters = [p for m in model.trainable_networks().values() for n, p in m.named_parameters() if "lora_" in n]
    assert found["reference"] == 0 and found["gradients"] == 4 * sum(p.numel() for p in adapters) > 0


def test_settings_take_off_what_they_say():
    """By the bytes of the tensors that they hold elsewhere or shorter."""
    style = VGGGramLoss(weights="random").to("meta")

    def count(**options):
        return memory.iteration(memory.prepare(TINY["C-SD2"]().to("meta")), 1, 32, style, **options)

    plain, held = count(), count(frozen_dtype=torch.bfloat16)
    model = TINY["C-SD2"]()
    layers = (torch.nn.Linear, torch.nn.Conv2d)
    sizes = {
        name: sum(m.weight.nbytes for m in network.modules() if isinstance(m, layers))
        for name, network in model.networks.items()
    }
    frozen = sum(size for name, size in sizes.items() if name not in model.trained)
    assert plain["weights"] - held["weights"] == frozen / 2
    assert plain["reference"] - held["reference"] == (sum(sizes.values()) - frozen) / 2
    away, small = count(offload_reference=True), count(adam_8bit=True)
    assert away["reference"] == 0 and plain["peak"] - plain["reference"] <= away["peak"] < plain["peak"]
    assert plain["peak"] - small["peak"] == plain["Adam"] - small["Adam"] > 0


@pytest.mark.parametrize("count", [4095, 4096, 4097, 10_000])
def test_adam_in_8_bits_is_what_bitsandbytes_keeps(count):
    optim = pytest.importorskip(
        "bitsandbytes.optim", reason="bitsandbytes is not installed; pip install 'rfsr_ext[8bit]'"
    )
    parameter = torch.nn.Parameter(torch.zeros(count))
    parameter.grad = torch.ones(count)
    optimizer = optim.Adam8bit([parameter])
    optimizer.step()
    kept = {
        key: x for key, x in optimizer.state[parameter].items() if isinstance(x, torch.Tensor) and "qmap" not in key
    }
    assert memory.adam_of([parameter], in_8_bits=True) == sum(x.nbytes for x in kept.values())


@pytest.mark.parametrize("name", TWO)
def test_upscaling_takes_what_its_tiles_take(name):
    model = memory.prepare(TINY[name]().to("meta"))
    model.recipe = dataclasses.replace(model.recipe, tile=64, overlap=16)
    held = memory.weights_of(model)
    one, four = (memory.upscaling(model, batch, (256, 384)) - held for batch in (1, 4))
    image = 256 * 384 * 3 * 4
    assert image < one < four < 4 * one
    larger = memory.upscaling(model, 1, (512, 384)) - held
    assert larger < 2 * one  # the tiles' part does not grow


def test_systems_are_of_full_size_and_all_that_are_published():
    published: dict[type, int] = {}
    for entry in PUBLISHED.values():  # the first of those that share a class
        published.setdefault(import_object(entry.model, "model"), entry.parameters)
    found = {}
    for name, system in memory.SYSTEMS.items():
        networks = memory.build(name, torch.bfloat16).networks.values()
        found[system.kind] = sum(p.numel() for m in networks for p in m.parameters())
        assert {t.device.type for m in networks for t in (*m.parameters(), *m.buffers())} == {"meta"}
    assert found == published


def test_what_is_trained_at_full_size():
    for name, count in {"C-SD2": 1_230_138_964, "C-FLUX": 13_258_788_928, "SeeSR": 1_615_791_764}.items():
        model = memory.build(name, torch.bfloat16)
        assert sum(p.numel() for p in model.trained_parameters().values()) == count


@pytest.mark.parametrize("name", TWO)
def test_prompts_are_encoded_at_full_size(name):
    """By the stand-in for the tokenizer, which the tiny models above do not have."""
    model = memory.build(name, torch.bfloat16)
    with torch.device("meta"):
        condition = model.condition(torch.rand(2, 3, 64, 64, dtype=torch.bfloat16), ["", ""])
    assert all(tensor.device.type == "meta" for tensor in condition.shared.values())
    assert {tensor.shape[0] for tensor in condition.shared.values()} == {2}


def test_the_command_writes_its_tables(tmp_path, monkeypatch):
    monkeypatch.setitem(memory.SYSTEMS, "tiny", None)
    monkeypatch.setattr(
        memory, "build", lambda name, dtype, rank=0: memory.prepare(TINY["C-SD2"]().to("meta", dtype), rank)
    )
    monkeypatch.setattr(memory, "UHD", (32, 48))
    monkeypatch.setattr(memory, "SIDE", 256)  # enough that activations show in hundredths of a GiB
    options = ["--systems", "tiny", "--dtypes", "bfloat16", "--batches", "1", "--output", str(tmp_path / "m")]
    monkeypatch.setattr("sys.argv", ["memory", *options])
    memory.main()
    lines = (tmp_path / "m").read_text().splitlines()
    assert sum(line.startswith("| tiny, full | bfloat16 | 1 |") for line in lines) == 1 + len(memory.SETTINGS)
    assert sum(line.startswith("| tiny, LoRA of rank 8 | bfloat16 | 1 |") for line in lines) == 4
    peaks = {}
    for setting, _ in memory.SETTINGS:
        (line,) = (x for x in lines if x.startswith(f"| tiny, full | bfloat16 | 1 | {setting} |"))
        peaks[setting] = float(line.split("|")[-2])
    assert peaks["gradient_checkpointing"] < peaks["none"]
    for at_once in (1, 2):  # there are no four
        assert sum(line.startswith(f"| tiny | bfloat16 | 32² | 2 | {at_once} |") for line in lines) == 1
