"""SeeSR's U-Net and ControlNet (arXiv 2311.16518): diffusers' own, and after each look at the text one at the image.

In every block that attends to the prompt, a transformer of the same size follows that attends to RAM's image tokens.
Its weights are ``image_attentions``, beside the block's ``attentions``, as in the authors' files.
"""

from typing import Any

from diffusers import ControlNetModel, Transformer2DModel, UNet2DConditionModel
from torch import Tensor, nn

from rfsr_ext.networks.options import with_options

__all__ = ["SeeSRControlNet", "SeeSRUNet"]

TOKEN_WIDTH = 512  # of RAM's image tokens


class _TextThenImage(Transformer2DModel):
    """A block's attention to the prompt, which hands what it gives to the attention to the image.

    Diffusers' blocks call nothing but their ``attentions``.  The modules that follow are the block's, not this one's,
    or the names of their weights would be others: a tuple keeps them from being registered here.
    """

    _next: tuple[nn.ModuleList, int]

    def forward(self, hidden_states: Tensor, *args, cross_attention_kwargs: dict[str, Any], **kwargs):
        rest = dict(cross_attention_kwargs)
        tokens = rest.pop("image_encoder_hidden_states")
        (hidden_states,) = super().forward(
            hidden_states, *args, cross_attention_kwargs=rest, **kwargs | {"return_dict": False}
        )
        modules, index = self._next
        return modules[index](hidden_states, tokens, cross_attention_kwargs=rest, return_dict=False)


def _add_image_attentions(network: Any) -> None:
    blocks = [*network.down_blocks, network.mid_block, *getattr(network, "up_blocks", ())]
    for block in blocks:
        if not getattr(block, "has_cross_attention", False):
            continue
        block.image_attentions = nn.ModuleList(_like(text) for text in block.attentions)
        for index, text in enumerate(block.attentions):
            text.__class__ = _TextThenImage  # blocks build theirs by a fixed name
            text._next = block.image_attentions, index


def _like(text: Transformer2DModel) -> Transformer2DModel:
    """A transformer of the same size that attends to image tokens."""
    # not from_config, which takes arguments that were given by position for defaults
    sizes = {name: value for name, value in text.config.items() if not name.startswith("_")}
    return Transformer2DModel(**sizes | {"cross_attention_dim": TOKEN_WIDTH})


class _AttendsToImage:
    """What U-Net and ControlNet have in common: ``image_attentions``, and image tokens besides what the stock takes."""

    def _extend(self, use_image_cross_attention: bool) -> None:
        if not use_image_cross_attention:
            raise ValueError(
                f"use_image_cross_attention must be true for {type(self).__name__}, got false: this is a plain Stable "
                f"Diffusion network, without SeeSR's image_attentions"
            )
        _add_image_attentions(self)

    def forward(self, *args, image_encoder_hidden_states: Tensor, cross_attention_kwargs=None, **kwargs):
        passed = {**(cross_attention_kwargs or {}), "image_encoder_hidden_states": image_encoder_hidden_states}
        return super().forward(*args, cross_attention_kwargs=passed, **kwargs)  # pyrefly: ignore[missing-attribute]


class SeeSRUNet(_AttendsToImage, UNet2DConditionModel):
    """`UNet2DConditionModel` with ``image_attentions``.

    Takes ``image_encoder_hidden_states`` ``[N, L, 512]`` besides what that takes.

    Raises:
        ValueError: if ``use_image_cross_attention`` of its config is false.
    """

    @with_options(UNet2DConditionModel, use_image_cross_attention=True)
    def __init__(self, *args, use_image_cross_attention: bool = True, **kwargs):
        super().__init__(*args, **kwargs)
        self._extend(use_image_cross_attention)


class SeeSRControlNet(_AttendsToImage, ControlNetModel):
    """`ControlNetModel` with ``image_attentions``.

    Takes ``image_encoder_hidden_states`` ``[N, L, 512]`` besides what that takes.

    Raises:
        ValueError: if ``use_image_cross_attention`` of its config is false.
    """

    @with_options(ControlNetModel, use_image_cross_attention=True)
    def __init__(self, *args, use_image_cross_attention: bool = True, **kwargs):
        super().__init__(*args, **kwargs)
        self._extend(use_image_cross_attention)
