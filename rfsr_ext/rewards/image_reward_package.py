"""The package image-reward 1.5 beside current releases of everything else::

    pip install --no-deps image-reward
    pip install timm                    # is there already with the extra `rewards`

Without ``--no-deps`` pip would go back to timm 0.6.13, which pyiqa cannot use.  As released the package works up to
transformers 4.55; `import_package` mends these, and nothing outside the package stays changed:

====================================================== ==========================================================
what breaks                                            what is done
====================================================== ==========================================================
1. ``clip`` is not there, or wants ``pkg_resources``   stands in during the import; scores of CLIP alone need it
2. transformers moved ``apply_chunking_to_forward``    lent to ``modeling_utils`` during the import
3. transformers dropped                                the same; it only serves to prune heads
   ``find_pruneable_heads_and_indices``
4. transformers moved ``prune_linear_layer``           the same
5. ``fairscale`` pins an old torch                     stands in during the import; only checkpointing needs it
6. tokenizers lost ``additional_special_tokens_ids``   ``init_tokenizer`` looks up the one number it is asked for
7. transformers wants ``all_tied_weights_keys``        an empty attribute of the package's BERT
8. transformers dropped ``invert_attention_mask``      a method of the package's BERT
9. transformers dropped ``get_head_mask``              a method of the package's BERT
====================================================== ==========================================================

``datasets``, which only its training script needs, stands in too where it is not installed.
"""

import contextlib
import importlib
import importlib.util
import json
import sys
import tempfile
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from rfsr_ext.weights.pyiqa import with_pkg_resources
from rfsr_ext.weights.reading import reason

__all__ = ["PackageModel", "build_network", "import_package"]

_STAND_INS = {  # what modules that no score needs take from packages that may not be there
    "clip": (),
    "datasets": ("load_dataset",),
    "fairscale.nn.checkpoint.checkpoint_activations": ("checkpoint_wrapper",),
}
_MOVED = ("apply_chunking_to_forward", "find_pruneable_heads_and_indices", "prune_linear_layer")


def import_package() -> types.ModuleType:
    """The package ``ImageReward``, as its own documentation describes it.

    Raises:
        ModuleNotFoundError: if it cannot be imported, with the reason and what to install.
    """
    try:
        with _importable():
            package = importlib.import_module("ImageReward")
            med, blip, pretrain = (
                importlib.import_module(f"ImageReward.models.BLIP.{name}") for name in ("med", "blip", "blip_pretrain")
            )
    except Exception as error:  # with other versions of its dependencies it fails in many ways
        raise ModuleNotFoundError(
            f"the package image-reward cannot be imported ({reason(error)}); pip install --no-deps image-reward, and "
            "timm, or take backend 'transformers', which gives the same scores without it",
            name="ImageReward",
        ) from error
    blip.init_tokenizer = pretrain.init_tokenizer = _init_tokenizer
    for name, value in {"all_tied_weights_keys": {}, "invert_attention_mask": _invert_attention_mask,
                        "get_head_mask": _get_head_mask}.items():  # fmt: skip
        if not hasattr(med.BertPreTrainedModel, name):
            setattr(med.BertPreTrainedModel, name, value)
    return package


@contextlib.contextmanager
def _importable() -> Iterator[None]:
    """What the package imports is there within the block; warnings and logging are as before after it."""
    from transformers import logging, modeling_utils, pytorch_utils

    modules = {}
    for name, wanted in _STAND_INS.items():
        if name not in sys.modules and importlib.util.find_spec(name.partition(".")[0]) is None:
            modules[name] = types.ModuleType(name)
            vars(modules[name]).update({function: _absent(f"{name}.{function}") for function in wanted})
    lent = [name for name in _MOVED if not hasattr(modeling_utils, name)]
    verbosity = logging.get_verbosity()
    try:
        sys.modules.update(modules)
        for name in lent:
            setattr(modeling_utils, name, getattr(pytorch_utils, name, _absent(f"transformers' {name}")))
        with with_pkg_resources(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # timm calls the modules by which the package reaches it deprecated
            yield
    finally:
        for name in modules:
            del sys.modules[name]
        for name in lent:
            delattr(modeling_utils, name)
        logging.set_verbosity(verbosity)


def _absent(name: str) -> Callable:
    def refuse(*args, **options):
        raise ModuleNotFoundError(f"image-reward needs {name} for this, which is not installed")

    return refuse


def _init_tokenizer():
    from transformers import BertTokenizer

    tokenizer = BertTokenizer.from_pretrained("bert-base-uncased")
    tokenizer.add_tokens(["[DEC]", "[ENC]"], special_tokens=True)
    tokenizer.enc_token_id = tokenizer.convert_tokens_to_ids("[ENC]")
    return tokenizer


def _invert_attention_mask(model, mask: Tensor) -> Tensor:
    """``[N, L]`` or ``[N, L, L]`` of ones and zeros to what is added to the scores: 0, or the smallest number."""
    mask = mask[:, None, None, :] if mask.dim() == 2 else mask[:, None]
    return (1.0 - mask.to(model.dtype)) * torch.finfo(model.dtype).min


def _get_head_mask(model, mask, layers: int) -> list[None]:
    if mask is not None:
        raise ValueError(f"head_mask must be None, got a {type(mask).__name__}; no score of image-reward masks heads")
    return [None] * layers


class PackageModel(nn.Module):
    """The package's network behind the interface of `rfsr_ext.rewards.image_reward.ImageRewardModel`."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network.requires_grad_(False).eval()

    def forward(self, ids: Tensor, mask: Tensor, pixels: Tensor) -> Tensor:
        self.network.device = pixels.device
        pixels = pixels.to(self.network.blip.visual_encoder.cls_token.dtype)
        scores = self.network.score_gard(ids, mask, pixels).squeeze(-1)
        return scores.to(torch.promote_types(scores.dtype, torch.float32))


def build_network(tensors: dict[str, Tensor], tokenizer, config: dict) -> PackageModel:
    """The package's network with these weights; its own ``load`` would download configuration and tokenizer.

    Args:
        tensors: of ImageReward.pt, by the names they have there.
        tokenizer: takes the place of its own.
        config: BLIP's ``med_config.json``.

    Raises:
        ModuleNotFoundError: if the package cannot be imported.
    """
    import_package()
    original = importlib.import_module("ImageReward.ImageReward")  # the package hides the module behind its class
    pretrain = importlib.import_module("ImageReward.models.BLIP.blip_pretrain")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "med_config.json"
        path.write_text(json.dumps(config), encoding="utf-8")
        try:
            pretrain.init_tokenizer = lambda: tokenizer
            network = original.ImageReward(med_config=str(path))
        finally:
            pretrain.init_tokenizer = _init_tokenizer
    network.load_state_dict(tensors, strict=False)  # as the package does: position_ids come and go with transformers
    return PackageModel(network)
