"""ResNeXt (Xie et al. 2017, arXiv 1611.05431) and the improved ResNeXt50 with multi-scale feature fusion.

The improved ResNeXt50 is that of section 3 of "An image classification algorithm based on the improved ResNext50":
grouped convolution, y = concat_g(W_g * x_g), and F_fusion = sum_i alpha_i F_i over features of several scales. With
`fusion='none'` it is ResNeXt.
"""

from collections.abc import Callable

import flax.linen as nn
import jax

from vitcls.core import errors
from vitcls.models import layers, resnet
from vitcls.models.preset import Preset

_FUSIONS = ("none", "kernels", "stages")


class ResNeXt(resnet.ResNet):
    """A ResNet of grouped bottlenecks; images, logits, errors and what is sown as there, and 'fusion_map'.

    The paper says "multiple convolution kernels of different sizes in the middle layer of the network" and no more.
    Here `fusion='kernels'` adds F_fusion to the map of one stage, so that the network keeps what it has; each F_i is a
    convolution, norm and activation of that map, grouped as all others are. `fusion='stages'` brings the maps of
    several stages to one width (1x1) and to the size of the largest, and classifies a 3x3 convolution of their sum.
    """

    groups: int = 32  # cardinality
    group_width: int = 4  # channels of a group in the first stage
    fusion: str = "none"  # 'kernels', 'stages'
    fusion_kernels: tuple[int, ...] = (1, 3, 5)  # of fusion='kernels', odd
    fusion_stage: int = 2  # of fusion='kernels': the stage whose map is fused
    fusion_stages: tuple[int, ...] = (2, 3, 4)  # of fusion='stages': the stages whose maps are fused
    fusion_width: int = 512  # of fusion='stages': channels of the sum

    @property
    def behind(self) -> dict[str, str]:
        """Modules whose names do not say behind which block they stand -> that block."""
        stage = self.fusion_stage
        return {"fusion": f"stage_{stage}_block_{self.depths[stage - 1]}"} if self.fusion == "kernels" else {}

    def learned_weights(self, params: dict) -> dict[str, jax.Array]:
        """The fusion weights alpha_i by scale, float32 scalars that sum to 1; {} without fusion."""
        if self.fusion == "none":
            return {}
        kernels = self.fusion == "kernels"
        scales = [f"{k}x{k}" for k in self.fusion_kernels] if kernels else [f"stage {i}" for i in self.fusion_stages]
        weights = jax.nn.softmax(params["fusion"]["logits"], axis=-1)
        return {f"Fusion weight of {scale}": weights[..., i] for i, scale in enumerate(scales)}

    def _check(self, shape: tuple[int, ...]) -> None:
        super()._check(shape)
        if self.fusion not in _FUSIONS:
            raise ValueError(errors.not_known("fusion", self.fusion, _FUSIONS))
        stages = range(1, len(self.depths) + 1)
        kernels = self.fusion_kernels
        if self.fusion == "kernels" and (len(set(kernels)) < len(kernels) or not all(size % 2 for size in kernels)):
            raise ValueError(f"fusion_kernels={kernels} must be odd numbers, each of them once")
        if self.fusion == "kernels" and self.fusion_stage not in stages:
            raise ValueError(f"fusion_stage={self.fusion_stage} must be in 1 .. {len(stages)}")
        if self.fusion == "stages" and list(self.fusion_stages) != sorted(set(self.fusion_stages) & set(stages)):
            raise ValueError(f"fusion_stages={self.fusion_stages} must be stages of 1 .. {len(stages)}, in their order")

    def _groups(self) -> int:
        return self.groups

    def _inner_width(self) -> int:
        return self.groups * self.group_width

    def _after_stage(self, x: jax.Array, stage: int, unit: Callable, *, train: bool) -> jax.Array:
        if self.fusion != "kernels" or stage != self.fusion_stage:
            return x
        fused = KernelFusion(self.fusion_kernels, self.groups, unit, name="fusion")(x, train=train)
        self.sow("intermediates", "fusion_map", fused)
        return x + fused

    def _merge(self, maps: list[jax.Array], unit: Callable, *, train: bool) -> jax.Array:
        if self.fusion != "stages":
            return maps[-1]
        chosen = [maps[stage - 1] for stage in self.fusion_stages]
        fused = StageFusion(self.fusion_width, unit, name="fusion")(chosen, train=train)
        self.sow("intermediates", "fusion_map", fused)
        return unit(self.fusion_width, 3, groups=self.groups, name="fusion_conv")(fused, train=train)


class KernelFusion(nn.Module):
    """F_fusion = sum_i alpha_i F_i, F_i made by kernels of several sizes: [B, H, W, C] -> [B, H, W, C]."""

    kernels: tuple[int, ...]
    groups: int
    unit: Callable[..., layers.ConvNorm]

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        scales = [
            self.unit(x.shape[-1], kernel, groups=self.groups, name=f"conv_{kernel}x{kernel}")(x, train=train)
            for kernel in self.kernels
        ]
        return _weighted_sum(self, scales)


class StageFusion(nn.Module):
    """F_fusion = sum_i alpha_i F_i, F_i the maps of several stages: list of [B, H_i, W_i, C_i] -> [B, H_1, W_1, F]."""

    features: int
    unit: Callable[..., layers.ConvNorm]

    @nn.compact
    def __call__(self, maps: list[jax.Array], *, train: bool) -> jax.Array:
        scales = []
        for i, x in enumerate(maps):
            x = self.unit(self.features, 1, activation="linear", name=f"lateral_{i + 1}")(x, train=train)
            shape = (x.shape[0], *maps[0].shape[1:3], self.features)
            scales.append(jax.image.resize(x, shape, "bilinear").astype(x.dtype))
        return _weighted_sum(self, scales)


def _weighted_sum(module: nn.Module, scales: list[jax.Array]) -> jax.Array:
    """sum_i alpha_i F_i; the weights are the softmax of a parameter of `module` and start equal."""
    weights = jax.nn.softmax(module.param("logits", nn.initializers.zeros, (len(scales),)))
    return sum(weight.astype(scale.dtype) * scale for weight, scale in zip(weights, scales, strict=True))


_RESNEXT = "Xie et al. 2017, arXiv 1611.05431"
_IMPROVED = "An image classification algorithm based on the improved ResNext50"
PRESETS = {
    "resnext50_32x4d": Preset(ResNeXt, {}, _RESNEXT),
    "resnext101_32x8d": Preset(ResNeXt, {"depths": (3, 4, 23, 3), "group_width": 8}, _RESNEXT),
    "resnext29_8x64d": Preset(
        ResNeXt, {"depths": (3, 3, 3), "groups": 8, "group_width": 64, "stem": "small"}, _RESNEXT, (32, 32, 3), 10
    ),
    "improved_resnext50": Preset(ResNeXt, {"fusion": "kernels", "dropout": 0.2}, _IMPROVED),
    # "a smaller convolution kernel size and reducing the number of convolution layers" (section 3)
    "improved_resnext50_lite": Preset(
        ResNeXt,
        {"depths": (2, 2, 2, 2), "stem_kernel": 3, "fusion": "kernels", "fusion_kernels": (1, 3), "dropout": 0.2},
        _IMPROVED,
    ),
}
