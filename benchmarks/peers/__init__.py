"""The same training in other libraries, written as their users write it."""

from vitcls import models

_VIT_FIELDS = ("patch_size", "hidden_dim", "depth", "num_heads", "mlp_dim")


def vit_fields(name: str) -> dict[str, int]:
    """The fields of the plain ViT `name` that a peer needs to build it too; {} for another model."""
    return {key: value for key, value in models.fields(name).items() if key in _VIT_FIELDS and name.startswith("vit_")}
