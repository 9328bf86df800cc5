"""Draws degradations.png: for each preset two crops of photographs, each with three of its low-resolution images.

``python docs/degradations.py``, from the repository's root.  The low-resolution images are enlarged without smoothing.
"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from rfsr_ext.data import Degradation, load_photograph
from rfsr_ext.data.degradation import DEGRADATIONS
from rfsr_ext.data.images import to_uint8

SIDE, GAP, LINE = 160, 6, 20
CROPS = (("astronaut", 40, 160), ("coffee", 130, 210))  # public domain and CC0; top and left


def tiles(preset: str) -> list[np.ndarray]:
    """Ground truth and low-resolution images in turn, all of one size."""
    degradation, found = Degradation.preset(preset), []
    for number, (photograph, top, left) in enumerate(CROPS):
        crop = np.ascontiguousarray(load_photograph(photograph)[top : top + SIDE, left : left + SIDE])
        pairs = [degradation.degrade(crop, degradation.generator((0, 3 * number + index))) for index in range(3)]
        found.append(pairs[0][1])
        found += [lr.repeat(degradation.scale, axis=0).repeat(degradation.scale, axis=1) for lr, _ in pairs]
    return found


def main() -> None:
    columns = len(CROPS) * 4
    size = (columns * (SIDE + GAP) + GAP, len(DEGRADATIONS) * (SIDE + LINE + GAP) + GAP)
    page = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(14)
    for row, preset in enumerate(DEGRADATIONS):
        top = GAP + row * (SIDE + LINE + GAP)
        for column, tile in enumerate(tiles(preset)):
            left = GAP + column * (SIDE + GAP)
            label = "ground truth" if column % 4 == 0 else f"{preset}, {column // 4 * 3 + column % 4}"
            draw.text((left, top), label, fill="black", font=font)
            page.paste(Image.fromarray(to_uint8(tile)), (left, top + LINE))
    page.save(Path(__file__).with_suffix(".png"), optimize=True)


if __name__ == "__main__":
    main()
