"""RAM, the Recognize Anything Model (Zhang et al., arXiv 2306.03514): what a photograph shows, as tags and as tokens.

SeeSR (arXiv 2311.16518) fine-tuned it for degraded photographs and calls that DAPE: a LoRA over RAM, which is merged
into RAM's own weights here once, when the files are opened.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from rfsr_ext.networks.swin import Swin
from rfsr_ext.weights import registry
from rfsr_ext.weights.reading import differences, load_strictly, read_tensors

__all__ = ["DAPE_FILE", "RAM", "RAM_FILE", "merge_lora", "read_tags"]

RAM_FILE = "ram_swin_large_14m.pth"
DAPE_FILE = "DAPE.pth"
TAGS_FILE = "ram_tag_list.txt"
THRESHOLDS_FILE = "ram_tag_list_threshold.txt"
_RAM = f"RAM ({RAM_FILE}, which `rfsr weights` lists)"
_DAPE = f"DAPE ({DAPE_FILE}, which https://github.com/cswry/SeeSR says where to find)"
TOKEN_WIDTH = 512  # of image tokens and label embeddings; the only one that RAM and SeeSR know
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet

# In the published file and not needed: captioning, what the tagging head has no use for, and what follows from sizes.
_UNUSED = re.compile(
    r"(tag_encoder|text_decoder)\..+|tagging_head\.embeddings\..+|tagging_head\.encoder\.layer\.\d+\.attention\..+"
    r"|.+\.relative_position_index|.+\.attn_mask"
)


class _TaggingLayer(nn.ModuleDict):
    """A layer of BERT without self-attention, under BERT's names: labels look at the image, then an MLP; post-norm."""

    def __init__(self, width: int, intermediate: int, heads: int):
        def output(before: int) -> nn.ModuleDict:
            return nn.ModuleDict({"dense": nn.Linear(before, width), "LayerNorm": nn.LayerNorm(width, eps=1e-12)})

        attention = {
            "query": nn.Linear(width, width),
            "key": nn.Linear(TOKEN_WIDTH, width),
            "value": nn.Linear(TOKEN_WIDTH, width),
        }
        super().__init__(
            {
                "crossattention": nn.ModuleDict({"self": nn.ModuleDict(attention), "output": output(width)}),
                "intermediate": nn.ModuleDict({"dense": nn.Linear(width, intermediate)}),
                "output": output(intermediate),
            }
        )
        self.heads = heads

    def forward(self, labels: Tensor, tokens: Tensor) -> Tensor:
        """``[N, K, D]`` and ``[N, L, 512]`` to ``[N, K, D]``."""
        part = self.get_submodule
        query, key, value = (
            part(f"crossattention.self.{name}")(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for name, x in (("query", labels), ("key", tokens), ("value", tokens))
        )
        seen = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        labels = part("crossattention.output.LayerNorm")(part("crossattention.output.dense")(seen) + labels)
        hidden = F.gelu(part("intermediate.dense")(labels))
        return part("output.LayerNorm")(part("output.dense")(hidden) + labels)


class RAM(ModelMixin, ConfigMixin):
    """A Swin Transformer whose tokens a small decoder compares with one embedding for each of 4585 tags.

    tokens = W [mean(x), x] with x = Swin(image); tag k is given where sigmoid(logit_k) > threshold_k.

    Args:
        image_size, patch_size, embed_dim, depths, num_heads, window_size, mlp_ratio: see `Swin`.
        hidden_size, intermediate_size, num_hidden_layers, num_attention_heads: of the decoder.
        num_tags: K.
        tag_names: the K tags; without them there are tokens and logits only.
        thresholds: one for each tag, as a probability.

    Raises:
        ValueError: if there are not K names and K thresholds.
    """

    @register_to_config
    def __init__(
        self,
        image_size: int = 384,
        patch_size: int = 4,
        embed_dim: int = 192,
        depths: Sequence[int] = (2, 2, 18, 2),
        num_heads: Sequence[int] = (6, 12, 24, 48),
        window_size: int = 12,
        mlp_ratio: float = 4.0,
        hidden_size: int = 768,
        intermediate_size: int = 3072,
        num_hidden_layers: int = 2,
        num_attention_heads: int = 4,
        num_tags: int = 4585,
        tag_names: Sequence[str] | None = None,
        thresholds: Sequence[float] | None = None,
    ):
        super().__init__()
        for name, given in (("tag_names", tag_names), ("thresholds", thresholds)):
            if given is not None and len(given) != num_tags:
                raise ValueError(f"{name} must be one for each of {num_tags} tags, got {len(given)}")
        self.visual_encoder = Swin(
            image_size, patch_size, embed_dim, tuple(depths), tuple(num_heads), window_size, mlp_ratio
        )
        self.image_proj = nn.Linear(self.visual_encoder.num_features, TOKEN_WIDTH)
        layers = [_TaggingLayer(hidden_size, intermediate_size, num_attention_heads) for _ in range(num_hidden_layers)]
        self.tagging_head = nn.ModuleDict({"encoder": nn.ModuleDict({"layer": nn.ModuleList(layers)})})
        self.label_embed = nn.Parameter(torch.zeros(num_tags, TOKEN_WIDTH))
        self.wordvec_proj = nn.Identity() if hidden_size == TOKEN_WIDTH else nn.Linear(TOKEN_WIDTH, hidden_size)
        self.fc = nn.Linear(hidden_size, 1)

    def preprocess(self, images: Tensor) -> Tensor:
        """Images ``[N, 3, H, W]`` in [0, 1] to ``[N, 3, S, S]`` of mean 0 and deviation 1 over ImageNet.

        Resized bicubically and clamped, as SeeSR does in training; its test script resizes bilinearly.  An image that
        becomes smaller is smoothed first, which neither does, or fine texture would show as something else.
        """
        size = self.config.image_size
        images = images.float()
        smaller = max(images.shape[-2:]) > size
        images = F.interpolate(images, (size, size), mode="bicubic", antialias=smaller).clamp(0, 1)
        mean, std = (images.new_tensor(x).view(3, 1, 1) for x in (MEAN, STD))
        return ((images - mean) / std).to(self.dtype)

    def tokens(self, images: Tensor) -> Tensor:
        """Images ``[N, 3, H, W]`` in [0, 1], of any size, to ``[N, 1 + L, 512]``: the mean token and L = (S/32)²."""
        x = self.visual_encoder(self.preprocess(images))
        return self.image_proj(torch.cat([x.mean(dim=1, keepdim=True), x], dim=1))

    forward = tokens

    def logits(self, images: Tensor) -> Tensor:
        """Images ``[N, 3, H, W]`` in [0, 1] to ``[N, K]``, one for each tag."""
        tokens = self.tokens(images)
        labels = F.relu(self.wordvec_proj(self.label_embed)).expand(len(tokens), -1, -1)
        for layer in self.tagging_head.get_submodule("encoder.layer").children():
            labels = layer(labels, tokens)
        return self.fc(labels).squeeze(-1)

    @property
    def has_tags(self) -> bool:
        """Whether the tags' names and thresholds are known."""
        return self.config.tag_names is not None and self.config.thresholds is not None

    @torch.no_grad()
    def tags(self, images: Tensor) -> list[str]:
        """Images ``[N, 3, H, W]`` in [0, 1] to what each shows, as "tag, tag", in the order of the list.

        Raises:
            ValueError: if the tags' names or thresholds are not known.
        """
        if not self.has_tags:
            raise ValueError(
                f"RAM needs {TAGS_FILE} and {THRESHOLDS_FILE} to give tags; put them beside its weights or let "
                f"`rfsr weights fetch ram-tags ram-thresholds` get them, and open it again"
            )
        probabilities = self.logits(images).float().sigmoid()
        found = probabilities > probabilities.new_tensor(self.config.thresholds)
        return [", ".join(self.config.tag_names[k] for k in row.nonzero()[:, 0].tolist()) for row in found]

    @classmethod
    def from_released(
        cls,
        folder: str | Path | Sequence[str | Path] = (),
        *,
        dape: bool | None = None,
        image_size: int | None = None,
        torch_dtype: torch.dtype = torch.float32,
    ) -> Self:
        """RAM from the files its authors publish; nothing is downloaded.

        What is not in ``folder`` is looked for where `rfsr weights` looks, ``RFSR_WEIGHTS`` first.  The lists of tags
        may also lie in ``../../ram/data``, where SeeSR's repository has them, and may be missing: tokens need none.

        Args:
            folder: one or more that hold ``ram_swin_large_14m.pth``, ``DAPE.pth``, ``ram_tag_list.txt`` and
                ``ram_tag_list_threshold.txt``.
            dape: merge DAPE's LoRA; by default if its file is found.
            image_size: that the weights were trained for; by default the one that leaves the last stage one window,
                384 for the published weights.
            torch_dtype: of the weights.

        Raises:
            FileNotFoundError: if a file that is needed is nowhere.
            ValueError: if one is damaged or of another model.
        """
        folders = [Path(folder)] if isinstance(folder, str | Path) else [Path(one) for one in folder]
        path = _find(folders, RAM_FILE) or registry.locate("ram")
        adapter = None if dape is False else _find(folders, DAPE_FILE)
        if dape and adapter is None:
            raise FileNotFoundError(
                f"{DAPE_FILE} (RAM for degraded photographs) is not in {' or '.join(map(str, _places(folders)))}; "
                f"https://github.com/cswry/SeeSR says where to find it"
            )
        tensors = {name.replace("vision_multi", "tagging_head"): x for name, x in read_tensors(path, _RAM).items()}
        tensors = {name: x for name, x in tensors.items() if not _UNUSED.fullmatch(name)}
        sizes = _sizes(tensors, path, image_size)
        names, thresholds = read_tags(folders, sizes["num_tags"])
        with torch.device("meta"):
            model = cls(**sizes, tag_names=names, thresholds=thresholds)
        load_strictly(model, tensors, path, _RAM, assign=True)
        if adapter is not None:
            load_strictly(model, merge_lora(model.state_dict(), adapter), adapter, _DAPE, assign=True)
        nn.Module.to(model, torch_dtype)
        model.requires_grad_(False).eval()
        return model


def _places(folders: list[Path]) -> list[Path]:
    more = [Path(place) for place in [os.environ.get("RFSR_WEIGHTS")] if place]
    return list(dict.fromkeys([*folders, *more]))  # a folder may be given twice, as weights and as base


def _find(folders: list[Path], file: str) -> Path | None:
    return next((place / file for place in _places(folders) if (place / file).is_file()), None)


def merge_lora(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """RAM's tensors with DAPE's LoRA merged in: W + B A / r for every pair of rank r.

    Where W holds queries, keys and values, A and B hold one pair for the queries and one for the values.  The tagging
    head shares its W with the captioning encoder, so that the authors' code merges that encoder's pairs as well, if it
    has been trained; its A and B are in the file under ``tag_encoder``.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, or is not such a LoRA over just these layers.
    """
    stored = read_tensors(path, _DAPE)
    adapter = {name: x for name, x in stored.items() if not _UNUSED.fullmatch(name)}
    wanted = [
        name.removesuffix(".weight")
        for name in tensors
        if re.fullmatch(r"visual_encoder\..+\.qkv\.weight|tagging_head\..+\.self\.(query|key)\.weight", name)
    ]
    pairs = {f"{name}.lora_{side}": name for name in wanted for side in "AB"}
    missing, strange = [n for n in pairs if n not in adapter], [n for n in adapter if n not in pairs]
    if missing or strange:
        raise ValueError(f"{str(path)!r} is not {_DAPE}: {differences(missing, strange)}")
    merged = dict(tensors)
    for name in wanted:
        weight = tensors[f"{name}.weight"].float()
        for pair in dict.fromkeys((name, name.replace("tagging_head.", "tag_encoder."))):
            if f"{pair}.lora_A" in stored and f"{pair}.lora_B" in stored:
                weight = weight + _product(stored[f"{pair}.lora_A"], stored[f"{pair}.lora_B"], name, weight, path)
        merged[f"{name}.weight"] = weight
    return merged


def _product(down: Tensor, up: Tensor, name: str, weight: Tensor, path: Path) -> Tensor:
    """B A / r in the shape of W; of queries and values with zeros for the keys between them."""
    groups = 2 if name.endswith(".qkv") else 1
    rows, columns = weight.shape[0] // (3 if groups == 2 else 1), weight.shape[1]
    rank = up.shape[-1]
    if up.shape != (groups * rows, rank) or down.shape != (groups * rank, columns):
        raise ValueError(
            f"{str(path)!r} is not {_DAPE} for this RAM: {name} of {list(weight.shape)} cannot have lora_A "
            f"{list(down.shape)} and lora_B {list(up.shape)}"
        )
    change = torch.bmm(up.float().view(groups, rows, rank), down.float().view(groups, rank, columns)) / rank
    if groups == 2:
        change = torch.stack([change[0], torch.zeros_like(change[0]), change[1]])
    return change.view_as(weight)


def read_tags(folders: list[Path], count: int) -> tuple[list[str] | None, list[float] | None]:
    """RAM's tags and their thresholds, None for a list that is nowhere; see `RAM.from_released`.

    Raises:
        ValueError: if a list has not ``count`` lines, or a threshold is no number.
    """
    places = [place for folder in folders for place in (folder, folder / "../../ram/data")]

    def lines(file: str, name: str) -> tuple[Path | None, list[str] | None]:
        path = next((place / file for place in places if (place / file).is_file()), None) or registry.find(name)
        if path is None:
            return None, None
        found = path.read_text(encoding="utf-8").splitlines()
        if len(found) != count:
            raise ValueError(f"{str(path)!r} must have a line for each of {count} tags, got {len(found)}")
        return path, found

    _, names = lines(TAGS_FILE, "ram-tags")
    path, thresholds = lines(THRESHOLDS_FILE, "ram-thresholds")
    try:
        return names, None if thresholds is None else [float(line) for line in thresholds]
    except ValueError as error:
        raise ValueError(f"{str(path)!r} must hold a number in every line: {error}") from error


def _sizes(tensors: dict[str, Tensor], path: Path, image_size: int | None) -> dict:
    """The arguments of `RAM` that follow from its tensors.

    Raises:
        ValueError: if a tensor that tells them is not there.
    """

    def shape(name: str) -> tuple[int, ...]:
        if name not in tensors:
            raise ValueError(f"{str(path)!r} is not {_RAM}: it lacks {name}")
        return tuple(tensors[name].shape)

    def count(pattern: str) -> int:
        return 1 + max((int(m[1]) for name in tensors if (m := re.match(pattern, name))), default=-1)

    embed_dim, _, patch_size, _ = shape("visual_encoder.patch_embed.proj.weight")
    stages = count(r"visual_encoder\.layers\.(\d+)\.")
    first = "visual_encoder.layers.{}.blocks.0."
    tables = [shape(f"{first.format(i)}attn.relative_position_bias_table") for i in range(stages)]
    window_size = max((round((offsets**0.5 + 1) / 2) for offsets, _ in tables), default=0)
    layer = "tagging_head.encoder.layer.0."
    return {
        "image_size": patch_size * 2 ** (stages - 1) * window_size if image_size is None else image_size,
        "patch_size": patch_size,
        "embed_dim": embed_dim,
        "depths": [count(rf"visual_encoder\.layers\.{i}\.blocks\.(\d+)\.") for i in range(stages)],
        "num_heads": [heads for _, heads in tables],
        "window_size": window_size,
        "mlp_ratio": shape(f"{first.format(0)}mlp.fc1.weight")[0] / embed_dim,
        "hidden_size": shape(f"{layer}crossattention.self.query.weight")[0],
        "intermediate_size": shape(f"{layer}intermediate.dense.weight")[0],
        "num_hidden_layers": count(r"tagging_head\.encoder\.layer\.(\d+)\."),
        "num_tags": shape("label_embed")[0],
    }
