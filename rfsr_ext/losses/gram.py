"""The style distance behind Gram loss (paper eq. 6): Gram matrices of VGG19 features."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from rfsr_ext.ops import gram_loss, gram_matrix
from rfsr_ext.ops.reference import CRITERIA
from rfsr_ext.weights.registry import locate

__all__ = ["VGG19Features", "VGGGramLoss", "vgg19_weights_path"]

BLOCKS = ((2, 64), (2, 128), (4, 256), (4, 512), (4, 512))  # VGG19's convolutions and their channels (arXiv 1409.1556)
LAYERS = {"conv1_2": 0.1, "conv2_2": 0.1, "conv3_4": 1.0, "conv4_4": 1.0, "conv5_4": 1.0}


def vgg19_weights_path() -> Path:
    """Where torchvision's ImageNet weights are, hash verified: in ``$RFSR_WEIGHTS``, else in torch hub's folder.

    Raises:
        FileNotFoundError: if they are in neither; the sentence says which file to put where.
        ValueError: if the file is damaged.
    """
    try:
        return locate("vgg19")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}, or choose weights='random'") from None


def _convolutions(last: str) -> nn.ModuleDict:
    """``torchvision.models.vgg19().features`` up to this convolution, by name, its weights not yet in memory.

    torchvision is not imported: each of its releases demands one torch.
    """
    modules, channels = nn.ModuleDict(), 3
    for block, (count, width) in enumerate(BLOCKS, 1):
        for position in range(1, count + 1):
            modules[f"conv{block}_{position}"] = nn.Conv2d(channels, width, 3, padding=1, device="meta")
            if last in modules:
                return modules
            # not in place, which would overwrite the convolution's output
            modules[f"relu{block}_{position}"] = nn.ReLU()
            channels = width
        modules[f"pool{block}"] = nn.MaxPool2d(2)
    return modules


def _imagenet_tensors(network: nn.ModuleDict) -> dict[str, Tensor]:
    tensors = torch.load(vgg19_weights_path(), map_location="cpu", weights_only=True, mmap=True)
    return {
        f"{name}.{part}": tensors[f"features.{index}.{part}"].clone()  # the file is mapped, not read
        for index, (name, module) in enumerate(network.items())
        if isinstance(module, nn.Conv2d)
        for part in ("weight", "bias")
    }


def _random_tensors(network: nn.ModuleDict, seed: int) -> dict[str, Tensor]:
    """Kaiming's uniform distribution, as he has it for ReLU and fan-out, and biases of zero.

    From numbers in [0, 1) by one product and one difference, each rounded by itself, so that the weights are the same
    on every machine: PyTorch's normal distribution differs in the last bits between processors.
    """
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for name, module in network.items():
        if isinstance(module, nn.Conv2d):
            bound = (6 / (module.out_channels * 9)) ** 0.5
            uniform = torch.rand(module.weight.shape, generator=generator, dtype=torch.float32, device="cpu")
            tensors[f"{name}.weight"] = uniform.mul_(2 * bound).sub_(bound)
            tensors[f"{name}.bias"] = torch.zeros(module.out_channels, dtype=torch.float32, device="cpu")
    return tensors


class VGG19Features(nn.Module):
    """Outputs of named VGG19 convolutions, before their ReLU, for ``[N, 3, H, W]`` images in [0, 1].

    Images of another floating-point type than the network's are taken to it.

    Args:
        layers: names such as ``conv3_4``.
        weights: "imagenet" (torchvision's file must be on disk) or "random" (a seeded random network, the same on every
            machine: a stand-in whose Gram matrices still measure texture statistics, though not those a trained network
            is sensitive to).
        seed: of the random network.

    Raises:
        FileNotFoundError: if the ImageNet weights are not on disk.
        TypeError: if images are not floating point.
        ValueError: for a layer or kind of weights that there is not; if images have another shape, or are so small that
            nothing of them is left at the last layer.
    """

    def __init__(self, layers: Sequence[str] = tuple(LAYERS), weights: str = "imagenet", seed: int = 0):
        super().__init__()
        if weights not in ("imagenet", "random"):
            raise ValueError(f"weights must be 'imagenet' or 'random', got {weights!r}")
        names = [f"conv{block}_{i}" for block, (count, _) in enumerate(BLOCKS, 1) for i in range(1, count + 1)]
        if not layers:
            raise ValueError(f"layers must be at least one of {names}, got none")
        if wrong := [layer for layer in layers if layer not in names]:
            raise ValueError(f"layers must be among {names}, got {wrong[0]!r}")
        self.weights, self.layers = weights, list(layers)
        self.features = _convolutions(max(layers, key=names.index))
        drawn = weights == "random"
        tensors = _random_tensors(self.features, seed) if drawn else _imagenet_tensors(self.features)
        self.features.load_state_dict(tensors, assign=True)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406], dtype=torch.float32).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225], dtype=torch.float32).view(1, 3, 1, 1))
        self.smallest = 2 ** sum(isinstance(module, nn.MaxPool2d) for module in self.features.values())
        self.requires_grad_(False).eval().to(self.mean.device)  # torch's default device, as any module's

    def forward(self, images: Tensor) -> list[Tensor]:
        if not images.is_floating_point():
            raise TypeError(f"images must be floating point in [0, 1], got {images.dtype}; divide 8-bit images by 255")
        if images.ndim != 4 or images.shape[1] != 3 or min(images.shape[2:]) < self.smallest:
            raise ValueError(
                f"images must be [N, 3, H, W], at least {self.smallest} pixels high and wide for these layers, got "
                f"shape {tuple(images.shape)}"
            )
        x, collected = (images.to(self.mean.dtype) - self.mean) / self.std, {}
        for name, module in self.features.items():
            x = module(x)
            if name in self.layers:
                collected[name] = x
        return [collected[layer] for layer in self.layers]


class VGGGramLoss(nn.Module):
    """Σ_l w_l d(G_l(pred) − G_l(target)), mean over the batch, G_l the Gram matrix of layer l divided by C·H·W.

    d is the squared Frobenius norm of eq. 6 unless another criterion is named.  Gradients reach ``pred`` alone.  Layers
    and weights are those of the released RFSR code: conv1_2, 2_2, 3_4, 4_4, 5_4 before their ReLU, weighted 0.1, 0.1,
    1, 1, 1.  Its criterion is ``criterion="l1", joint_layer_norm=True`` with every weight divided by the layer's C².

    Args:
        layers: weight by layer name.
        weights: "imagenet" or "random", see `VGG19Features`.
        criterion: "l2", "l1" or "fro", see `rfsr_ext.ops.gram_loss`.
        joint_layer_norm: normalize each sample's features over C, H and W before their Gram matrix.
    """

    def __init__(
        self,
        layers: dict[str, float] | None = None,
        weights: str = "imagenet",
        criterion: str = "l2",
        joint_layer_norm: bool = False,
    ):
        super().__init__()
        layers = LAYERS if layers is None else layers
        if criterion not in CRITERIA:
            raise ValueError(f"criterion must be 'l2', 'l1' or 'fro', got {criterion!r}")
        self.layer_weights = list(layers.values())
        self.criterion, self.joint_layer_norm = criterion, joint_layer_norm
        self.vgg = VGG19Features(tuple(layers), weights)

    @property
    def label(self) -> str:
        """The name shown to people: it says so if the network is a random one."""
        return "Gram loss" if self.vgg.weights == "imagenet" else "Gram loss (random VGG19, a stand-in)"

    @torch.no_grad()
    def target_gram(self, target: Tensor) -> list[Tensor]:
        """The target's Gram matrices, to be computed once where it is compared with many times."""
        return [gram_matrix(features, joint_layer_norm=self.joint_layer_norm) for features in self.vgg(target)]

    def forward(
        self, pred: Tensor, target: Tensor | None = None, *, target_gram: Sequence[Tensor] | None = None
    ) -> Tensor:
        wanted = None
        if target is not None:
            with torch.no_grad():
                wanted = self.vgg(target)
        return gram_loss(
            self.vgg(pred),
            wanted,
            self.layer_weights,
            target_gram=target_gram,
            criterion=self.criterion,
            joint_layer_norm=self.joint_layer_norm,
        )
