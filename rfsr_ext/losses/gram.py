"""The style distance behind Gram-KL (paper eq. 6): Gram matrices of VGG19 features."""

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


def _convolutions() -> nn.Sequential:
    """``torchvision.models.vgg19().features``. torchvision is not imported: each of its releases demands one torch."""
    modules, channels = [], 3
    for count, width in BLOCKS:
        for _ in range(count):
            modules += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
            channels = width
        modules.append(nn.MaxPool2d(2))
    return nn.Sequential(*modules)


def _imagenet_features() -> nn.Sequential:
    tensors = torch.load(vgg19_weights_path(), map_location="cpu", weights_only=True, mmap=True)
    network, prefix = _convolutions(), "features."
    network.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    return network


def _random_features(seed: int) -> nn.Sequential:
    """The convolutions of ``torchvision.models.vgg19()`` under this seed, without half a gigabyte of classifier."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _convolutions()
        for fan_in, fan_out in ((512 * 7 * 7, 4096), (4096, 4096), (4096, 1000)):  # what the classifier would draw
            for _ in range(fan_out):
                torch.rand(fan_in)
            torch.rand(fan_out)
        for module in network:
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(module.bias)
    return network


class VGG19Features(nn.Module):
    """Outputs of named VGG19 convolutions, before their ReLU, for ``[N, 3, H, W]`` images in [0, 1].

    Args:
        layers: names such as ``conv3_4``.
        weights: "imagenet" (torchvision's file must be on disk) or "random" (a seeded random network: a stand-in whose
            Gram matrices still measure texture statistics, though not those a trained network is sensitive to).
        seed: of the random network.
    """

    def __init__(self, layers: Sequence[str] = tuple(LAYERS), weights: str = "imagenet", seed: int = 0):
        super().__init__()
        if weights not in ("imagenet", "random"):
            raise ValueError(f"weights must be 'imagenet' or 'random', got {weights!r}")
        self.weights = weights
        network = _imagenet_features() if weights == "imagenet" else _random_features(seed)
        names, block, position = [], 1, 0
        for module in network:
            if isinstance(module, nn.Conv2d):
                position += 1
                names.append(f"conv{block}_{position}")
            elif isinstance(module, nn.MaxPool2d):
                block, position = block + 1, 0
                names.append("")
            else:
                names.append("")
        missing = [layer for layer in layers if layer not in names]
        if missing:
            raise ValueError(f"layers must be among {[name for name in names if name]}, got {missing[0]!r}")
        self.layers = list(layers)
        self._taps = {names.index(layer): layer for layer in layers}
        modules = list(network)[: max(self._taps) + 1]
        # in place, a ReLU would overwrite the convolution's output that was just collected
        self.features = nn.ModuleList(nn.ReLU() if isinstance(module, nn.ReLU) else module for module in modules)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> list[Tensor]:
        x, collected = (images - self.mean) / self.std, {}
        for index, module in enumerate(self.features):
            x = module(x)
            if index in self._taps:
                collected[self._taps[index]] = x
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
        joint_layer_norm: normalise each sample's features over C, H and W before their Gram matrix.
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
        """What to call it in front of people: a random network is never passed off as a trained one."""
        return "Gram-KL" if self.vgg.weights == "imagenet" else "Gram-KL (random VGG19, a stand-in)"

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
