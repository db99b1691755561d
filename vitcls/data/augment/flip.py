"""The mirror image."""

import dataclasses

import jax


@dataclasses.dataclass(frozen=True)
class Flip:
    """Left becomes right."""

    probability: float = 0.0

    def __call__(self, key: jax.Array, image: jax.Array) -> jax.Array:
        return image[:, ::-1]
