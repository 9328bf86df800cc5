"""The real photographs that come inside scikit-image and scikit-learn: names, tags, sources, licenses and splits.

Nothing is downloaded: both packages carry these files in their wheels.  The split is by photograph, so that no pixel of
a held-out scene is ever trained on.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np

__all__ = ["PHOTOGRAPHS", "Photograph", "load_photograph", "photographs"]


@dataclass(frozen=True)
class Photograph:
    """One photograph: the tags a tagger would give it, its source and license, and the split it is in."""

    name: str
    tags: tuple[str, ...]
    split: str  # "train", "validation" (chooses the best checkpoint) or "test" (only ever measured)
    source: str
    license: str


PHOTOGRAPHS = {
    photograph.name: photograph
    for photograph in (
        Photograph("astronaut", ("woman", "astronaut", "portrait", "orange suit", "flag"), "train",
                   "skimage.data.astronaut (NASA)", "public domain"),
        Photograph("brick", ("brick", "wall", "texture"), "train", "skimage.data.brick (CC0 Textures)", "CC0"),
        Photograph("camera", ("man", "camera", "tripod", "grass", "buildings"), "train",
                   "skimage.data.camera (Lav Varshney)", "CC0"),
        Photograph("china", ("temple", "roof", "building", "trees", "sky"), "train",
                   "sklearn.datasets china.jpg (danielbuechele, Flickr)", "CC BY 2.0"),
        Photograph("coins", ("coins", "metal", "relief"), "train", "skimage.data.coins (Brooklyn Museum)",
                   "no known restrictions"),
        Photograph("grass", ("grass", "plants", "texture"), "train", "skimage.data.grass (linolafett, DeviantArt)",
                   "CC0"),
        Photograph("gravel", ("gravel", "stones", "texture"), "train", "skimage.data.gravel (CC0 Textures)", "CC0"),
        Photograph("hubble_deep_field", ("galaxies", "stars", "space"), "train",
                   "skimage.data.hubble_deep_field (NASA)", "public domain"),
        Photograph("immunohistochemistry", ("microscopy", "tissue", "cells"), "train",
                   "skimage.data.immunohistochemistry (CMMI)", "no known restrictions"),
        Photograph("moon", ("moon", "craters", "surface"), "train", "skimage.data.moon (NASA)", "public domain"),
        Photograph("motorcycle", ("motorcycle", "wheel", "garage", "metal"), "train",
                   "skimage.data.stereo_motorcycle, left image (Middlebury 2014)", "free for research with citation"),
        Photograph("retina", ("retina", "vessels", "eye"), "train", "skimage.data.retina (Mikael Häggström)", "CC0"),
        Photograph("rocket", ("rocket", "launch", "smoke", "sky", "tower"), "validation",
                   "skimage.data.rocket (SpaceX)", "public domain"),
        Photograph("coffee", ("coffee", "cup", "spoon", "wood", "table"), "test",
                   "skimage.data.coffee (Rachel Michetti)", "CC0"),
        Photograph("chelsea", ("cat", "eyes", "fur", "whiskers"), "test", "skimage.data.chelsea (Stéfan van der Walt)",
                   "CC0"),
        Photograph("flower", ("flower", "petals", "plant"), "test",
                   "sklearn.datasets flower.jpg (vultilion, Flickr)", "CC BY 2.0"),
    )
}  # fmt: skip


def photographs(split: str) -> list[str]:
    """Names of the photographs of one split, in a fixed order.

    Raises:
        ValueError: if there is no such split.
    """
    names = [photograph.name for photograph in PHOTOGRAPHS.values() if photograph.split == split]
    if not names:
        raise ValueError(f"split must be 'train', 'validation' or 'test', got {split!r}")
    return names


@cache
def load_photograph(name: str) -> np.ndarray:
    """One photograph as float32 RGB in [0, 1], shape ``[H, W, 3]`` (gray photographs repeat their channel).

    Raises:
        ValueError: if there is no photograph of that name.
    """
    import skimage.data
    from sklearn.datasets import load_sample_image

    if name not in PHOTOGRAPHS:
        raise ValueError(f"name must be one of {sorted(PHOTOGRAPHS)}, got {name!r}")
    if name in ("china", "flower"):
        image = load_sample_image(f"{name}.jpg")
    elif name == "motorcycle":
        image = skimage.data.stereo_motorcycle()[0]
    else:
        image = getattr(skimage.data, name)()
    if image.ndim == 2:
        image = np.repeat(image[..., None], 3, axis=-1)
    image = image[..., :3].astype(np.float32) / 255
    image.flags.writeable = False
    return image
