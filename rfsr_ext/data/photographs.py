"""Real photographs: names, tags, sources, licenses and splits.

`PHOTOGRAPHS` come inside scikit-image and scikit-learn: nothing is downloaded, both carry these files in their wheels.
`PACKAGED` come inside packages of Debian, and only ``rfsr mini build`` wants them, in a folder that these were unpacked
in; nothing is installed:

    apt-get download lomiri-wallpapers-16.04 lomiri-wallpapers-20.04 mate-backgrounds plasma-workspace-wallpapers
    for package in *.deb; do dpkg-deb -x "$package" photographs/; done

The split is by photograph, so that no pixel of a held-out scene is ever trained on.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from rfsr_ext.data.images import read_image, resize

__all__ = ["PACKAGED", "PHOTOGRAPHS", "Photograph", "load_photograph", "photographs"]

_LONG_SIDE = 1600  # packaged photographs are made smaller than this: at their own size few are sharp


@dataclass(frozen=True)
class Photograph:
    """One photograph: the tags a tagger would give it, its source and license, and the split it is in."""

    name: str
    tags: tuple[str, ...]
    split: str  # "train", "validation" (chooses the best checkpoint) or "test" (only ever measured)
    source: str
    license: str
    path: str = ""  # of one of `PACKAGED` in the folder of the unpacked packages


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


def _packaged(package: str, path: str, license: str) -> Callable[..., Photograph]:
    def photograph(name: str, author: str, *tags: str, split: str = "train", license: str = license) -> Photograph:
        return Photograph(name, tags, split, f"{package} ({author})", license, f"usr/share/{path.format(name)}")

    return photograph


_LOMIRI_16 = _packaged("lomiri-wallpapers-16.04", "backgrounds/{}.jpg", "CC BY 4.0")
_LOMIRI_20 = _packaged("lomiri-wallpapers-20.04", "backgrounds/{}.jpg", "CC BY-SA 3.0")
_MATE = _packaged("mate-backgrounds", "backgrounds/mate/nature/{}.jpg", "GPL-2+")
_PLASMA = _packaged("plasma-workspace-wallpapers", "wallpapers/{}/contents/images/2560x1600.jpg", "LGPL-3")

PACKAGED = {
    photograph.name: photograph
    for photograph in (
        _LOMIRI_16("Bridge_by_Sander_Klootwijk", "Sander Klootwijk", "bridge", "cables", "sky", license="CC BY-SA 4.0"),
        _LOMIRI_16("Dragonfly_by_Bolly", "Bolly", "leaves", "branches", "sky", license="CC BY-SA 4.0"),
        _LOMIRI_16("Picture_0B_by_freespace", "Trevor Freespace", "fig", "bowl", "concrete"),
        _LOMIRI_16("Picture_1A_by_freespace", "Trevor Freespace", "brushes", "paint", "colors", split="test"),
        _LOMIRI_16("Wine_by_Jakkub_Mede", "Jakub Mede", "wine", "table", "room", "drum"),
        _LOMIRI_16("aitzgorri_by_Aitzol_Berasategi", "Aitzol Berasategi", "mountain", "meadow", "trees"),
        _LOMIRI_16("free_by_Peter_Nerlich", "Peter Nerlich", "bird", "lamps", license="CC BY-SA 4.0"),
        _LOMIRI_16("friends_by_Aitzol_Berasategi", "Aitzol Berasategi", "dogs", "door", "wood"),
        _LOMIRI_16("greentock_by_Peter_Nerlich", "Peter Nerlich", "clock", "numbers", license="CC BY-SA 4.0"),
        _LOMIRI_16("life_by_Aitzol_Berasategi", "Aitzol Berasategi", "stream", "rocks", "forest"),
        _LOMIRI_16("picosdeeuropa_by_Aitzol_Berasategi", "Aitzol Berasategi", "mountain", "path", "snow", split="test"),
        _LOMIRI_16("seeding_by_Clements_Engelhardt", "Clemens Engelhardt", "dandelion", "meadow", "sun", license="CC0"),
        _LOMIRI_16("sunset_by_Aitzol_Berasategi", "Aitzol Berasategi", "sunset", "hills", "sky"),
        _LOMIRI_20("Kleiber_by_Lukas_Baubkus", "Lukas Baubkus", "bird", "tree", "bark", split="test"),
        _MATE("Aqua", "Charles Barbin", "water", "drop"),
        _MATE("Blinds", "Lennart Poettering or Andrea Cimitan", "leaf", "plant"),
        _MATE("Dune", "Marco Cogoni", "grass", "dune", "sea"),
        _MATE("FreshFlower", "Jens Ansorg", "flower", "petals"),
        _MATE("Garden", "Charles Barbin", "flower", "garden"),
        _MATE("GreenMeadow", "Timothy Schellhase", "grass", "meadow"),
        _MATE("LadyBird", "Charles Barbin", "ladybird", "flower", "leaf", split="test"),
        _MATE("RainDrops", "blackcombwhistler07", "leaf", "drops", "grass"),
        _MATE("Storm", "Sergey Nazarov", "clouds", "road", "sky"),
        _MATE("TwoWings", "Charles Barbin", "seeds", "plant"),
        _MATE("Wood", "Jean-François Fortin Tam", "wood", "texture"),
        _MATE("YellowFlower", "Charles Barbin", "flower", "petals"),
        _PLASMA("BytheWater", "Maciej Wiklo", "planks", "wood", "water"),
        _PLASMA("ColdRipple", "Risto Saukonpää", "pier", "planks", "fog"),
        _PLASMA("ColorfulCups", "Dmitri Popov", "cups", "colors"),
        _PLASMA("DarkestHour", "Risto Saukonpää", "lake", "trees", "fog"),
        _PLASMA("EveningGlow", "Ian Hex", "boats", "lake", "sunset", split="test"),
        _PLASMA("FallenLeaf", "Martin Klapetek", "leaves", "leaf"),
        _PLASMA("Grey", "Sigi Sagi", "building", "facade", "lines"),
        _PLASMA("Kite", "Risto Saukonpää", "kite", "sky", "clouds"),
        _PLASMA("OneStandsOut", "Risto Saukonpää", "moss", "plants"),
        _PLASMA("Path", "Risto Saukonpää", "forest", "path", "trees"),
        _PLASMA("summer_1am", "Risto Saukonpää", "lake", "sky", "reeds"),
    )
}


def photographs(split: str, packaged: bool = False) -> list[str]:
    """Names of the photographs of one split, in a fixed order; of `PACKAGED` on request.

    Raises:
        ValueError: if there is no such split.
    """
    names = [p.name for p in (PACKAGED if packaged else PHOTOGRAPHS).values() if p.split == split]
    if not names:
        raise ValueError(f"split must be 'train', 'validation' or 'test', got {split!r}")
    return names


@cache
def load_photograph(name: str, folder: Path | None = None) -> np.ndarray:
    """One photograph as float32 RGB in [0, 1], shape ``[H, W, 3]`` (gray photographs repeat their channel).

    Args:
        name: of one of `PHOTOGRAPHS`, or with ``folder`` of `PACKAGED`.
        folder: where the Debian packages are unpacked.

    Raises:
        ValueError: if there is no photograph of that name.
        FileNotFoundError: if one of `PACKAGED` is not in the folder.
    """
    if folder is not None and name in PACKAGED:
        image = _load_packaged(PACKAGED[name], folder)
    elif name in PHOTOGRAPHS:
        image = _load_bundled(name)
    else:
        known = sorted(PHOTOGRAPHS) if folder is None else sorted(PHOTOGRAPHS | PACKAGED)
        raise ValueError(f"name must be one of {known}, got {name!r}")
    image.flags.writeable = False
    return image


def _load_bundled(name: str) -> np.ndarray:
    import skimage.data
    from sklearn.datasets import load_sample_image

    if name in ("china", "flower"):
        image = load_sample_image(f"{name}.jpg")
    elif name == "motorcycle":
        image = skimage.data.stereo_motorcycle()[0]
    else:
        image = getattr(skimage.data, name)()
    if image.ndim == 2:
        image = np.repeat(image[..., None], 3, axis=-1)
    return image[..., :3].astype(np.float32) / 255


def _load_packaged(photograph: Photograph, folder: Path) -> np.ndarray:
    path = folder / photograph.path
    if not path.is_file():
        package = photograph.source.split()[0]
        raise FileNotFoundError(
            f"photograph {photograph.name!r} must be in {str(folder)!r} as {photograph.path!r}, got no such file; "
            f"`apt-get download {package}` and `dpkg-deb -x {package}_*.deb {folder}` put it there"
        )
    image = read_image(path)
    factor = min(1, _LONG_SIDE / max(image.shape))
    size = round(image.shape[0] * factor), round(image.shape[1] * factor)
    return resize(image, size, Image.Resampling.LANCZOS).clip(0, 1)
