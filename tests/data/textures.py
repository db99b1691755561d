"""Images for tests: smooth coloured waves with edges, the same on every machine."""

import numpy as np


def textures(count: int, size: int = 32) -> np.ndarray:
    """uint8 [count, size, size, 3]."""
    rng = np.random.default_rng(0)
    y, x = (axis[..., None] / size for axis in np.mgrid[:size, :size])
    images = []
    for _ in range(count):
        fy, fx, phase = rng.uniform(-3, 3, 3), rng.uniform(-3, 3, 3), rng.uniform(0, 6, 3)
        waves = 127 + 80 * np.sin(2 * np.pi * (fy * y + fx * x) + phase)
        top, left = rng.integers(0, size // 2, 2)
        waves[top : top + size // 3, left : left + size // 3] = rng.integers(0, 256, 3)
        images.append(np.clip(waves + rng.normal(0, 6, waves.shape), 0, 255).astype(np.uint8))
    return np.stack(images)
