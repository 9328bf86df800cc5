"""Dead-leaves images: overlapping random shapes, the simplest model with the statistics of natural images.

They have sharp occlusion edges at every scale (Lee, Mumford and Huang, 2001), cost nothing to ship, and keep a model
that sees a dozen photographs from learning those photographs by heart.
"""

import numpy as np

__all__ = ["dead_leaves"]


def dead_leaves(size: int, rng: np.random.Generator, shapes: int = 64) -> np.ndarray:
    """Draw one dead-leaves image, float32 RGB in [0, 1], shape ``[size, size, 3]``.

    Radii follow the scale-invariant density r⁻³; each leaf is an ellipse or a rectangle, plain, shaded or striped.
    """
    y, x = np.mgrid[0:size, 0:size].astype(np.float32)
    image = np.ones((size, size, 3), np.float32) * rng.random(3, dtype=np.float32)
    small, large = 3.0, size / 2
    u = rng.random(shapes)
    radii = np.sort(1 / np.sqrt(u / small**2 + (1 - u) / large**2))[::-1]
    for radius in radii:
        cx, cy = rng.uniform(-0.1, 1.1, 2) * size
        angle, aspect = rng.uniform(0, np.pi), rng.uniform(0.4, 1)
        across = (x - cx) * np.cos(angle) + (y - cy) * np.sin(angle)
        along = ((y - cy) * np.cos(angle) - (x - cx) * np.sin(angle)) / aspect
        is_ellipse = rng.random() < 0.6
        distance = np.hypot(across, along) if is_ellipse else np.maximum(np.abs(across), np.abs(along))
        coverage = np.clip(radius - distance + 0.5, 0, 1)[..., None]  # one pixel of anti-aliasing at the rim
        color = rng.random() + rng.uniform(-0.25, 0.25, 3)  # natural colors are mostly near gray
        kind = rng.random()
        if kind < 0.4:
            leaf = color
        elif kind < 0.7:
            leaf = color * (1 + 0.4 * np.clip(across / radius, -1, 1))[..., None]
        else:
            wave = np.sin(across * 2 * np.pi / rng.uniform(2.5, 10) + rng.uniform(0, 2 * np.pi))
            leaf = color + rng.uniform(0.05, 0.3) * wave[..., None]
        image += coverage * (leaf - image)
    return np.clip(image, 0, 1).astype(np.float32)
