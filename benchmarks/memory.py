"""What one RFSR iteration and a 4K result take of a GPU's memory, for systems at full size, without a GPU.

``python -m benchmarks.memory`` builds every system on the meta device, which has shapes and no numbers, runs the code
that trains and upscales it, and writes ``benchmarks/results/memory.md``. A new system is one line in SYSTEMS.

Counted is what tensors hold, the storage of each once, from its first operation to its end. Not counted are the
libraries' workspaces, the allocator's gaps and the CUDA context. Attention counts as the fused kernels have it, which
keep no matrix of all pairs. Rewards are not in it: they see one image at a time, and differ. Nor is `mixed_precision`,
which the meta device does not know: it keeps about half the activations, and copies of the trained weights beside them.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import itertools
import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxControlNetModel,
    FluxTransformer2DModel,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from rfsr_ext.evaluation.ways import markdown_rows
from rfsr_ext.losses import VGGGramLoss
from rfsr_ext.memory import bytes_of, hold_weights
from rfsr_ext.models import ISRModel
from rfsr_ext.models.ccsr import CCSRv1Model, CCSRv2ControlNetModel, CCSRv2Model
from rfsr_ext.models.csd2 import CSD2ISRModel
from rfsr_ext.models.diffbir import DiffBIRModel
from rfsr_ext.models.flux import FluxISRModel
from rfsr_ext.models.pasd import PASDControlNetModel, PASDModel, PASDUNet2DConditionModel
from rfsr_ext.models.seesr import SeeSRModel
from rfsr_ext.networks.controlnet import LatentControlNetModel
from rfsr_ext.networks.ram import RAM
from rfsr_ext.networks.seesr import SeeSRControlNet, SeeSRUNet
from rfsr_ext.networks.swinir import SwinIR
from rfsr_ext.rewards import Reward, WeightedReward
from rfsr_ext.sampling import denoise
from rfsr_ext.sampling.tiles import Tiled, Tiles
from rfsr_ext.training import RFSRConfig, setup
from rfsr_ext.training.rfsr import build_objective

RANK = 8  # of LoRA
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
RESULT = Path(__file__).parent / "results" / "memory.md"
SIDE = 512  # of the pictures in training
SETTINGS: list[tuple[str, dict[str, Any]]] = [  # of the configuration, each with all above it
    ("none", {}),
    ("gradient_checkpointing", {}),
    ("frozen_dtype: bfloat16", {"frozen_dtype": torch.bfloat16}),
    ("offload_reference", {"offload_reference": True}),
    ("optimizer: adam-8bit", {"adam_8bit": True}),
]
UHD = 2160, 3840


# ------------------------------------------------------------------------------------------ systems


class Tokenizer:
    """Stands for any tokenizer: as many tokens as the text encoder takes, all of them padding."""

    model_max_length = 77

    def __call__(self, texts: list[str], max_length: int, **_: Any) -> SimpleNamespace:
        tokens = torch.zeros(len(texts), max_length, dtype=torch.long, device="cpu")  # the mask's values are asked for
        return SimpleNamespace(input_ids=tokens, attention_mask=tokens)


def on_cpu(kind: type, **options: Any) -> Any:
    """A scheduler, whose numbers are needed."""
    with torch.device("cpu"):
        return kind(**options)


def autoencoder(**options: Any) -> AutoencoderKL:
    """That of Stable Diffusion; FLUX's differs by its channels."""
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, **options,
    )  # fmt: skip


def stable_diffusion_2(
    unet: Callable = UNet2DConditionModel, controlnet: Callable = ControlNetModel, **more: nn.Module
) -> dict[str, Any]:
    """The parts of Stable Diffusion 2-base or 2.1-base with a ControlNet, and what a system has beside them."""
    config = {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True}
    clip = CLIPTextConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16)
    return {
        "vae": autoencoder(), "text_encoder": CLIPTextModel(clip), "tokenizer": Tokenizer(),
        "unet": unet(**config), "controlnet": controlnet(**config),
        "scheduler": on_cpu(DDPMScheduler, clip_sample=False), **more,
    }  # fmt: skip


def pasd() -> dict[str, Any]:
    """The parts of Stable Diffusion 1.5 with PASD's networks, without the dense blocks that are an option."""
    config = {"cross_attention_dim": 768, "attention_head_dim": 8}
    clip = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    return {
        "vae": autoencoder(), "text_encoder": CLIPTextModel(clip), "tokenizer": Tokenizer(),
        "unet": PASDUNet2DConditionModel(**config), "controlnet": PASDControlNetModel(**config),
        "scheduler": on_cpu(UniPCMultistepScheduler),
    }  # fmt: skip


def flux_1_dev() -> dict[str, Any]:
    """The parts of FLUX.1-dev with the ControlNet of C-FLUX."""
    clip = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    t5 = T5Config(d_model=4096, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu")
    return {
        "vae": autoencoder(latent_channels=16, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1159),
        "text_encoder": CLIPTextModel(clip), "tokenizer": Tokenizer(),
        "text_encoder_2": T5EncoderModel(t5), "tokenizer_2": Tokenizer(),
        "transformer": FluxTransformer2DModel(guidance_embeds=True),
        "controlnet": FluxControlNetModel(num_layers=4, num_single_layers=0, guidance_embeds=True),
        "scheduler": on_cpu(FlowMatchEulerDiscreteScheduler, use_dynamic_shifting=True),
    }  # fmt: skip


class System(NamedTuple):
    """A model's class and what makes its parts; ``options`` of the class; the types in which people hold it."""

    kind: type[ISRModel]
    parts: Callable[[], dict[str, Any]]
    options: dict[str, Any] = {}
    dtypes: tuple[str, ...] = ("float32",)


CONTROLNET = {"trained": {"controlnet": ""}}  # what the authors of C-SD2 and C-FLUX train
OVER_LATENTS = functools.partial(LatentControlNetModel, conditioning_channels=4)
OVER_LATENTS_V2 = functools.partial(CCSRv2ControlNetModel, use_vae_encode_condition=True)
SYSTEMS: dict[str, System] = {
    "SeeSR": System(SeeSRModel, lambda: stable_diffusion_2(SeeSRUNet, SeeSRControlNet, ram=RAM())),
    "PASD": System(PASDModel, pasd),
    "DiffBIR v1": System(DiffBIRModel, lambda: stable_diffusion_2(controlnet=OVER_LATENTS, swinir=SwinIR())),
    "CCSR v1": System(CCSRv1Model, lambda: stable_diffusion_2(controlnet=OVER_LATENTS)),
    "CCSR v2": System(CCSRv2Model, lambda: stable_diffusion_2(controlnet=OVER_LATENTS_V2)),
    "C-SD2": System(CSD2ISRModel, stable_diffusion_2),
    "C-SD2, ControlNet alone": System(CSD2ISRModel, stable_diffusion_2, CONTROLNET),
    "C-FLUX": System(FluxISRModel, flux_1_dev, dtypes=("bfloat16",)),
    "C-FLUX, ControlNet alone": System(FluxISRModel, flux_1_dev, CONTROLNET, dtypes=("bfloat16",)),
}


def build(name: str, dtype: torch.dtype, rank: int = 0) -> ISRModel:
    """A system on the meta device; with ``rank`` its trained networks have adapters."""
    system = SYSTEMS[name]
    with torch.device("meta"):
        parts = system.parts()
    return prepare(system.kind(**parts, **system.options).to("meta", dtype), rank)


def prepare(model: ISRModel, rank: int = 0) -> ISRModel:
    """Let what is trained ask for gradients: what the model declares, or adapters."""
    if rank:
        setup.add_adapters(model, rank, RFSRConfig().lora_targets)
        for network in model.trainable_networks().values():
            network.to(model.device)  # peft leaves new adapters of a meta model on the CPU
    else:
        model.unfreeze()
    model.check_lr = lambda *_: None  # these two look at values
    model.describe = lambda lr: [""] * len(lr)
    return model


# ----------------------------------------------------------------------------------------- counting


class Live(TorchDispatchMode):
    """Bytes of the tensors that operations have made and that are still there: ``now``, and at most, ``peak``."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._storages = WeakIdKeyDictionary()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {x.untyped_storage()._cdata for x in torch.utils._pytree.tree_leaves((args, kwargs)) if _is_tensor(x)}
        outputs = function(*args, **kwargs or {})
        for output in torch.utils._pytree.tree_leaves(outputs):
            if _is_tensor(output) and (storage := output.untyped_storage())._cdata not in given:
                self._add(storage)
        return outputs

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage not in self._storages:
            self._storages[storage] = None
            size = storage.nbytes()
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._remove, size)

    def _remove(self, size: int) -> None:
        self.now -= size

    def beside(self, size: int, function: Callable, *args: Any) -> Any:
        """Call a function while ``size`` bytes are there that no operation has made."""
        self.now += size
        self.peak = max(self.peak, self.now)
        try:
            return function(*args)
        finally:
            self.now -= size

    @contextlib.contextmanager
    def kept_by(self, model: ISRModel, *methods: str) -> Iterator[dict[str, int]]:
        """Bytes that are there after calls of methods that record gradients, and were not before: for the backward."""
        kept = dict.fromkeys(methods, 0)

        def counted(name: str, method: Callable, *args: Any) -> Any:
            before = self.now
            result = method(*args)
            kept[name] += self.now - before if torch.is_grad_enabled() else 0
            return result

        for name in methods:
            setattr(model, name, functools.partial(counted, name, getattr(model, name)))
        try:
            yield kept
        finally:
            for name in methods:
                delattr(model, name)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


class _FusedAttention(torch.autograd.Function):
    """The memory of a fused kernel: inputs, output and one number per query are kept, and no matrix of all pairs."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


@contextlib.contextmanager
def as_on_gpu() -> Iterator[None]:
    """What the meta device lacks: it has the plain attention only, and knows no autocast."""
    fused = lambda query, key, value, *_, **__: _FusedAttention.apply(query, key, value)  # noqa: E731
    plain = mock.patch.object(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    with mock.patch.object(F, "scaled_dot_product_attention", fused), plain:
        yield


def weights_of(model: ISRModel, names: Iterable[str] | None = None) -> int:
    """Bytes of networks, of all by default."""
    return bytes_of(model.networks[name] for name in (names or model.networks))


def steps_with_a_rollout(model: ISRModel) -> int:
    """The fewest ``num_inference_steps`` of which something comes before the last; CCSR leaves some out."""
    return next(n for n in itertools.count(2) if len(model.process(n)) > 1)


def adam_of(parameters: Iterable[Tensor], in_8_bits: bool = False) -> int:
    """Bytes of Adam's two moments; in 8 bits, as bitsandbytes has them, each block of 256 has a number of its own."""
    sizes = (p.numel() + 4 * -(-p.numel() // 256) if in_8_bits and p.numel() >= 4096 else p.nbytes for p in parameters)
    return 2 * sum(sizes)


def iteration(
    model: ISRModel,
    batch: int,
    side: int,
    style: nn.Module | None = None,
    frozen_dtype: torch.dtype | None = None,
    offload_reference: bool = False,
    adam_8bit: bool = False,
) -> dict[str, int]:
    """Bytes of one iteration in the reward window, by what holds them; ``peak`` is everything at its worst moment.

    The objective is the trainer's own at the last of few steps, after a rollout: more steps take no more memory.

    Args:
        model: prepared, on the meta device.
        batch, side: of the pictures.
        style: the Gram loss, for which a frozen reference is kept (with adapters it is the model without them); None
            for no reference.
        frozen_dtype, offload_reference, adam_8bit: as in the configuration.
    """
    if frozen_dtype:
        for name, network in model.networks.items():
            if name not in model.trained:
                hold_weights(network, frozen_dtype)
    trained = [p for m in model.networks.values() for p in m.parameters() if p.requires_grad]
    steps = steps_with_a_rollout(model)
    last = len(model.process(steps))
    adapted = any(hasattr(m, "disable_adapter") for m in model.trainable_networks().values())
    config = RFSRConfig(
        crop_size=side, num_inference_steps=steps, window_unit="steps", structure_window=None,
        reward_window=(last, last), style_loss="none" if style is None else "gram", lora_rank=RANK if adapted else 0,
    )  # fmt: skip
    objective = build_objective(config, model, [WeightedReward(_Mean(), 1.0)], style)
    reference = objective.reference
    if frozen_dtype and reference is not None:
        for network in reference.trainable_networks().values():
            hold_weights(network, frozen_dtype)
    size = sum(p.nbytes for p in trained)
    found = {"weights": weights_of(model), "gradients": size, "Adam": adam_of(trained, adam_8bit), "EMA": size}
    found["reference"] = 0 if reference is None else weights_of(reference, reference.trained)
    gt, lr = (torch.rand(batch, 3, n, n, device="meta", dtype=model.dtype) for n in (side, side // model.scale))
    away = found["reference"] if offload_reference else 0
    with as_on_gpu(), Live() as live, live.kept_by(model, "predict", "decode") as kept:
        predict_reference = objective.predict_reference
        objective.predict_reference = lambda *args: live.beside(away, predict_reference, *args)
        loss, _ = objective(lr, gt, [""] * batch, last)
        found |= {"denoiser": kept["predict"], "decoder": kept["decode"]}
        found["style loss"] = live.now - sum(kept.values())
        loss.backward()
    for parameter in trained:
        parameter.grad = None
    found["reference"] -= away
    # gradients are among what is alive
    return found | {"peak": sum(found[name] for name in ("weights", "Adam", "EMA", "reference")) + live.peak}


class _Mean(Reward):
    """A reward that takes no memory."""

    name = "mean"

    def score(self, images: Tensor, prompts: list[str] | None = None) -> Tensor:
        return images.mean((1, 2, 3))


class _FirstTiles(Tiles):
    """The first two batches of tiles: whatever comes after them takes the same memory."""

    def corners(self) -> list[tuple[int, int]]:
        return super().corners()[: 2 * self.batch_size]


def tiles_of(model: ISRModel, batch: int, size: tuple[int, int], kind: type[Tiles] = Tiles) -> Tiles:
    """The recipe's tiles of a result of that size, ``batch`` at once."""
    unit = math.lcm(model.scale, model.multiple)
    height, width = (-(-n // unit) * unit for n in size)
    return kind(height, width, model.recipe.tile, model.recipe.overlap, unit, batch)


@torch.no_grad()
def upscaling(model: ISRModel, batch: int, size: tuple[int, int]) -> int:
    """Bytes at the peak of an upscaling to that size by tiles, ``batch`` at once, weights included."""
    tiles = tiles_of(model, batch, size, _FirstTiles)
    height, width = tiles.height, tiles.width
    tiled = Tiled(model, tiles)
    tiled.check_lr = model.check_lr
    lr = torch.rand(1, 3, height // model.scale, width // model.scale, device=model.device, dtype=model.dtype)
    guidance_scale = model.recipe.guidance_scale
    with as_on_gpu(), Live() as live:
        condition = tiled.condition(lr, [""], None if guidance_scale == 1 else [""])
        process = tiled.process()
        shape = 1, model.latent_channels, height // model.vae_scale_factor, width // model.vae_scale_factor
        latents = torch.rand(shape, device=model.device, dtype=model.dtype)
        output = denoise(tiled, process, latents, process.timesteps[0], condition, guidance_scale)
        del output
        tiled.decode(latents)
    return live.peak + weights_of(model)


# ------------------------------------------------------------------------------------------ report


def gib(size: int) -> str:
    return f"{size / 2**30:.2f}"


@functools.cache  # its random numbers take seconds
def style_loss() -> nn.Module:
    return VGGGramLoss(weights="random").to("meta")


def training_rows(name: str, dtype: str, batches: Iterable[int], side: int) -> Iterator[list[str]]:
    """A system with all its trained weights and with adapters, at every batch size."""
    style = style_loss()
    for rank in (0, RANK):
        model = build(name, DTYPES[dtype], rank)
        parameters = [p for m in model.networks.values() for p in m.parameters()]
        total, trained = (sum(p.numel() for p in parameters if p.requires_grad or every) for every in (True, False))
        for batch in batches:
            counts = iteration(model, batch, side, style)
            what = f"{name}, {f'LoRA of rank {rank}' if rank else 'full'}"
            yield [what, dtype, str(batch), f"{total / 1e6:,.0f}", f"{trained / 1e6:,.1f}", *map(gib, counts.values())]


def settings_rows(name: str, dtype: str, batches: Iterable[int], side: int) -> Iterator[list[str]]:
    """A system with more and more settings that save memory: what is held, what is kept for the backward, the peak."""
    for rank, settings in ((0, SETTINGS), (RANK, SETTINGS[:3])):  # adapters need no reference, and their moments little
        options: dict[str, Any] = {}
        for number, (setting, more) in enumerate(settings):
            options |= more
            style = style_loss()
            if "frozen_dtype" in options:
                style = hold_weights(copy.deepcopy(style), options["frozen_dtype"])
            for batch in batches:
                model = build(name, DTYPES[dtype])
                if number:
                    model.enable_gradient_checkpointing()
                counts = iteration(prepare(model, rank), batch, side, style, **options)
                held = sum(counts[part] for part in ("weights", "gradients", "Adam", "EMA", "reference"))
                sizes = held, counts["denoiser"], counts["decoder"], counts["peak"]
                what = f"{name}, {f'LoRA of rank {rank}' if rank else 'full'}"
                yield [what, dtype, str(batch), setting, *map(gib, sizes)]


def upscaling_rows(name: str, dtype: str, batches: Iterable[int]) -> Iterator[list[str]]:
    model = build(name, DTYPES[dtype])
    count = len(tiles_of(model, 1, UHD).corners())
    for batch in sorted({min(batch, count) for batch in batches}):
        tiles = [f"{model.recipe.tile}²", str(count), str(batch)]
        yield [name, dtype, *tiles, gib(weights_of(model)), gib(upscaling(model, batch, UHD))]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__.partition("\n")[0])
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="each system's own by default")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 8], help="pictures per iteration")
    parser.add_argument("--output", type=Path, default=RESULT)
    args = parser.parse_args()
    dtypes = args.dtypes or SYSTEMS[args.systems[0]].dtypes
    pairs = [(name, dtype) for name in args.systems for dtype in args.dtypes or SYSTEMS[name].dtypes]
    training = ["", "type", "batch", "M parameters", "of them trained", "weights", "gradients", "Adam", "EMA"]
    training += ["reference", "denoiser", "decoder", "style loss", "peak"]
    lines = [
        "# Memory, counted on the meta device",
        "",
        *(" ".join(__doc__.split("\n\n")[-1].split()), "", "Written by `python -m benchmarks.memory`; do not edit."),
        "",
        f"## One RFSR iteration in the reward window at {SIDE}², GiB",
        "",
        *markdown_rows(training, [row for pair in pairs for row in training_rows(*pair, args.batches, SIDE)]),
        "",
        "## The same with settings that save memory, each with those above it, GiB",
        "",
        *markdown_rows(
            ["", "type", "batch", "setting", "held", "denoiser", "decoder", "peak"],
            [row for dtype in dtypes for row in settings_rows(args.systems[0], dtype, args.batches, SIDE)],
        ),
        "",
        f"## Upscaling to {UHD[1]}×{UHD[0]} by the recipe's tiles, with its guidance, GiB",
        "",
        *markdown_rows(
            ["", "type", "tile", "tiles", "at once", "weights", "peak"],
            [row for name, dtype in pairs if "," not in name for row in upscaling_rows(name, dtype, (1, 4))],
        ),
    ]
    print("\n".join(lines))
    args.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
