"""The Vision Transformer and its improvements; all of them off is the ViT of Dosovitskiy et al. (arXiv 2010.11929).

The improved ViT keeps the encoder of section 2 of "Image Classification via an Improved Vision Transformer" and adds
what that section asks for: a feed-forward network with "deep activation functions and residual connections" for local
detail (`local_conv`, `squeeze_excite`), and an aggregation function g over all tokens (`aggregation`).
"""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from vitcls.models import attention, checks, convolutions, layers
from vitcls.models.preset import Preset

_COLUMNS = 16  # of tokens that the kernels of local detail have registers for
_CHOICES = {
    "stem": ("patch", "conv"),
    "position_embedding": ("learned", "sincos2d", "none"),
    "attention": attention.FORMS,
    "feed_forward": ("auto", "xla", "pallas"),
    "local_conv_blocks": ("all", "first_half", "second_half", "alternate"),
    "squeeze_excite_position": ("hidden", "input"),
    "aggregation": ("token", "mean", "gem", "attention", "mean_attention"),
}


class VisionTransformer(nn.Module):
    """images float [B, H, W, C], normalised -> logits float32 [B, num_classes].

    Parameters, softmax, the statistics of norms and the logits are float32 whatever `dtype`, the type of the rest.
    Positions are learned for the size of the first images; at another size they are interpolated.

    Sown into 'intermediates' where that collection is mutable: 'features' [B, D] and 'tokens' [B, N, D] after the last
    norm, and each block's 'attention_weights' [B, heads, N, N].

    Raises ValueError where the patches do not tile the images, and for a field whose value cannot work.
    """

    num_classes: int
    patch_size: int = 16  # pixels
    hidden_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_dim: int = 3072
    stem: str = "patch"  # 'patch': flatten and map; 'conv': 3x3 convolutions that halve the image
    position_embedding: str = "learned"  # 'sincos2d', 'none'
    qk_norm: bool = False
    layer_scale: float = 0.0  # the initial scale; 0 for none
    drop_path: float = 0.0  # of the last block; grows linearly from 0
    dropout: float = 0.0  # of embeddings, projections and the hidden layer
    attention_dropout: float = 0.0
    attention: str = "auto"  # see models/attention.py; only 'xla' while attention_dropout acts
    activation: str = "gelu"  # 'relu', 'silu'
    local_conv: bool = False  # depthwise 3x3 with an inner residual in the feed-forward network
    local_conv_blocks: str = "all"  # that have it: 'first_half', 'second_half', 'alternate' (the first, third, ...)
    squeeze_excite: float = 0.0  # width of the feed-forward network's gate, of hidden_dim; 0 for none
    squeeze_excite_position: str = "hidden"  # what it gates: the hidden layer, or the network's 'input'
    feed_forward: str = "auto"  # 'xla', 'pallas' of what local_conv and squeeze_excite add: models/local_detail.py
    aggregation: str = "token"  # g: 'token', 'mean', 'gem', 'attention', 'mean_attention'
    head_norm: bool = False  # a second norm, after the aggregation
    grouped_conv: str = "auto"  # of local_conv; see convolutions.GroupedConv
    remat: str = "none"  # 'block': recompute each block in the backward pass; 'dots': all but products
    dtype: str = "float32"  # 'bfloat16'

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        self._check(images.shape)
        tokens = self._embed(images.astype(self.dtype), train=train)  # [B, H, W, C] -> [B, N, D]
        grid = tuple(size // self.patch_size for size in images.shape[1:3])

        length = tokens.shape[1]
        tokens = jnp.pad(tokens, ((0, 0), (0, self._padding(length)), (0, 0)))
        block = layers.checkpointed(Block, self.remat)
        for i, drop_path in enumerate(layers.linear_rates(self.drop_path, self.depth)):
            tokens = block(self._design(i), grid, length, drop_path, name=f"block_{i}")(tokens, train)
        tokens = jax.lax.slice_in_dim(tokens, 0, length, axis=1)
        tokens = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="norm")(tokens)
        self.sow("intermediates", "tokens", tokens)

        features = self._aggregate(tokens)  # [B, N, D] -> [B, D]
        if self.head_norm:
            features = nn.LayerNorm(epsilon=1e-6, name="head_norm")(features)
        self.sow("intermediates", "features", features)
        return layers.head(features, self.num_classes, kernel_init=nn.initializers.truncated_normal(0.02))

    def _design(self, block: int) -> "Design":
        shared = {field.name: getattr(self, field.name) for field in dataclasses.fields(Design)}
        return Design(**shared | {"local_conv": self.local_conv and self._has_local_conv(block)})

    def _has_local_conv(self, block: int) -> bool:
        match self.local_conv_blocks:
            case "first_half":
                return block < self.depth / 2
            case "second_half":
                return block >= self.depth / 2
            case "alternate":
                return block % 2 == 0
            case _:
                return True

    def _padding(self, tokens: int) -> int:
        """Tokens to add, where nothing but attention looks from one token at another."""
        explicit = self.is_mutable_collection("intermediates") or self.attention_dropout
        return 0 if explicit or self.local_conv or self.squeeze_excite else attention.padding(tokens, self.attention)

    def _check(self, shape: tuple[int, ...]) -> None:
        self._check_fields()
        height, width = shape[1:3]
        if height % self.patch_size or width % self.patch_size:
            nearest = [max(1, round(size / self.patch_size)) * self.patch_size for size in (height, width)]
            raise ValueError(
                f"patch_size={self.patch_size} does not divide images of {height}x{width} pixels; "
                f"make them {nearest[0]}x{nearest[1]}, or the patches another size"
            )

    def _check_fields(self) -> None:
        checks.check_fields(self, _CHOICES)
        if self.hidden_dim % self.num_heads:
            raise ValueError(f"hidden_dim={self.hidden_dim} cannot be divided over num_heads={self.num_heads} heads")
        if self.stem == "conv" and self.patch_size & (self.patch_size - 1):
            raise ValueError(f"stem='conv' halves the image, so patch_size={self.patch_size} must be a power of two")

    def _embed(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Patches, positions and, where g is 'token', the class token: [B, H, W, C] -> [B, N, D]."""
        batch, height, width, channels = images.shape
        rows, columns = height // self.patch_size, width // self.patch_size
        if self.stem == "patch":
            patches = images.reshape(batch, rows, self.patch_size, columns, self.patch_size, channels)
            patches = patches.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * columns, -1)
            tokens = nn.Dense(self.hidden_dim, dtype=self.dtype, name="stem")(patches)
        else:
            tokens = ConvStem(self.patch_size, self.hidden_dim, self.activation, self.dtype, name="stem")(images)
            tokens = tokens.reshape(batch, rows * columns, self.hidden_dim)

        if self.position_embedding == "sincos2d":
            positions = layers.sincos_position_embedding(rows, columns, self.hidden_dim)
            tokens += positions.astype(tokens.dtype)[None]
        elif self.position_embedding == "learned":
            tokens += _for_each_image(self._learned_positions(rows, columns).astype(tokens.dtype), batch)
        if self.aggregation == "token":
            token = self.param("class_token", nn.initializers.zeros, (1, 1, self.hidden_dim))
            if self.position_embedding == "learned":
                init = nn.initializers.normal(0.02)
                token = token + self.param("class_position_embedding", init, (1, 1, self.hidden_dim))
            token = _for_each_image(token[0].astype(tokens.dtype), batch)
            tokens = jnp.concatenate([token, tokens], axis=1)
        return layers.Dropout(self.dropout)(tokens, train=train)

    def _learned_positions(self, rows: int, columns: int) -> jax.Array:
        """[rows * columns, D]; from the stored grid, whatever its size."""
        name, init = "position_embedding", nn.initializers.normal(0.02)
        shape = (rows, columns, self.hidden_dim)
        if self.has_variable("params", name):
            shape = self.get_variable("params", name).shape
        stored = self.param(name, init, shape)
        return layers.interpolate_position_embedding(stored, rows, columns).reshape(-1, self.hidden_dim)

    def _aggregate(self, tokens: jax.Array) -> jax.Array:
        """z = g(h_1, ..., h_n) (improved ViT, section 2): [B, N, D] -> [B, D], float32."""
        match self.aggregation:
            case "token":
                return jax.lax.index_in_dim(tokens, 0, axis=1, keepdims=False).astype(jnp.float32)
            case "mean":
                return jnp.mean(tokens.astype(jnp.float32), axis=1)
            case "gem":
                return layers.GeneralizedMean(name="aggregation")(tokens)
            case "attention":
                return layers.AttentionPool(name="aggregation")(tokens)
            case "mean_attention":
                return jnp.mean(tokens.astype(jnp.float32), axis=1) + layers.AttentionPool(name="aggregation")(tokens)


def _for_each_image(positions: jax.Array, batch: int) -> jax.Array:
    """[N, D] -> [batch, N, D], by a product with ones, so that the gradient is one too.

    That of a broadcast, a sum over the batch, makes XLA lay the tokens out with the batch innermost on GPUs, and every
    norm and residual of the network becomes a transpose.
    """
    return jnp.einsum("b,nd->bnd", jnp.ones((batch,), positions.dtype), positions)


class ConvStem(nn.Module):
    """3x3 convolutions that halve the image down to the grid of patches, then one more (Xiao et al. 2021).

    With patches of 4 pixels that are three layers, [B, 32, 32, C] -> [B, 8, 8, D].
    """

    patch_size: int
    hidden_dim: int
    activation: str
    dtype: str

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        act = layers.activation(self.activation)
        halvings = int(math.log2(self.patch_size))
        x = images
        for i in range(halvings):
            width = max(self.hidden_dim >> (halvings - 1 - i), 8)
            x = nn.Conv(width, (3, 3), (2, 2), padding=1, use_bias=False, dtype=self.dtype, name=f"conv_{i}")(x)
            x = act(nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name=f"norm_{i}")(x))
        return nn.Conv(self.hidden_dim, (3, 3), padding=1, dtype=self.dtype, name="project")(x)


@dataclasses.dataclass(frozen=True)
class Design:
    """Of a block: the fields of `VisionTransformer` of these names, `local_conv` where this block has it."""

    num_heads: int
    mlp_dim: int = 0
    qk_norm: bool = False
    layer_scale: float = 0.0
    dropout: float = 0.0
    attention_dropout: float = 0.0
    attention: str = "auto"
    activation: str = "gelu"
    local_conv: bool = False
    squeeze_excite: float = 0.0
    squeeze_excite_position: str = "hidden"
    feed_forward: str = "auto"
    grouped_conv: str = "auto"
    dtype: str = "float32"


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)): pre-norm, [B, N, D] -> [B, N, D]."""

    design: Design
    grid: tuple[int, int]
    length: int  # how many of the tokens are real: the first
    drop_path: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        design = self.design

        def residual(branch: jax.Array, name: str) -> jax.Array:
            if design.layer_scale:
                branch = layers.LayerScale(design.layer_scale, name=f"{name}_scale")(branch)
            return layers.DropPath(self.drop_path)(branch, train=train)

        attend = SelfAttention(design, self.length, name="attention")
        feed_forward = FeedForward(design, self.grid, name="feed_forward")
        y = nn.LayerNorm(epsilon=1e-6, dtype=design.dtype, name="attention_norm")(x)
        x += residual(attend(y, train=train), "attention")
        y = nn.LayerNorm(epsilon=1e-6, dtype=design.dtype, name="feed_forward_norm")(x)
        return x + residual(feed_forward(y, train=train), "feed_forward")


class SelfAttention(nn.Module):
    """Multi-head self-attention (improved ViT, section 2): [B, N, D] -> [B, N, D]; one matrix makes Q, K and V."""

    design: Design
    length: int = 0  # how many of the tokens are real: the first; 0 for all

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        batch, tokens, dim = x.shape
        xavier = nn.initializers.xavier_uniform()
        shape = (batch, tokens, self.design.num_heads, dim // self.design.num_heads)
        query, key, value = (part.reshape(shape) for part in QueryKeyValue(self.design.dtype, name="qkv")(x))
        if self.design.qk_norm:  # Dehghani et al. 2023, section 2.2
            query = nn.LayerNorm(epsilon=1e-6, use_bias=False, dtype=self.design.dtype, name="query_norm")(query)
            key = nn.LayerNorm(epsilon=1e-6, use_bias=False, dtype=self.design.dtype, name="key_norm")(key)

        explicit = self.is_mutable_collection("intermediates") or (train and self.design.attention_dropout > 0)
        with layers.precise_products(self.design.dtype):
            if explicit:
                weights = attention.weights(query, key)
                self.sow("intermediates", "attention_weights", weights)
                weights = layers.Dropout(self.design.attention_dropout)(weights, train=train)
                mixed = jnp.einsum("bhqk,bkhd->bqhd", weights.astype(value.dtype), value)
            else:
                mixed = attention.attend(query, key, value, self.design.attention, self.length)
        out = nn.Dense(dim, dtype=self.design.dtype, kernel_init=xavier, name="project")(
            mixed.reshape(batch, tokens, dim)
        )
        return layers.Dropout(self.design.dropout)(out, train=train)


class QueryKeyValue(nn.Module):
    """x W_q + b_q, x W_k + b_k and x W_v + b_v, each [B, N, D], of one kernel [D, 3 D]: the parameters of `nn.Dense`.

    Three products: slices of the result of one, and the concatenation of their gradients, would lower the ceiling of a
    ViT-S/16 step on an H100 by 3.5 % (benchmarks/compiled.py).
    """

    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> list[jax.Array]:
        dim = x.shape[-1]
        kernel = self.param("kernel", nn.initializers.xavier_uniform(), (dim, 3 * dim)).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, (3 * dim,)).astype(self.dtype)
        x = x.astype(self.dtype)
        parts = zip(jnp.split(kernel, 3, axis=1), jnp.split(bias, 3), strict=True)
        return [x @ part + shift[None, None] for part, shift in parts]


class FeedForward(nn.Module):
    """The feed-forward network with the paper's remedy for weak local detail (section 2): [B, N, D] -> [B, N, D].

    h = act(W1 x); with `local_conv` h = h + act(depthwise3x3(h)) on the grid of tokens, the inner residual of a deep
    activation; with `squeeze_excite` the channels of h are gated, or those of x; then W2 h. A class token skips the
    convolution, so that with aggregation 'token' the last block's reaches the logits through `squeeze_excite` alone.
    """

    design: Design
    grid: tuple[int, int]

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        design, dropout = self.design, layers.Dropout(self.design.dropout, name="dropout")
        gate = None
        if design.squeeze_excite:
            reduced = max(1, round(design.squeeze_excite * x.shape[-1]))
            gate = layers.SqueezeExcite(reduced, design.dtype, name="squeeze_excite")
        if gate and design.squeeze_excite_position == "input":
            x, gate = gate(x), None
        if self._fits_kernels(x.shape[1], gate):
            hidden = self._by_kernels(x, gate)
        else:
            hidden = gate(self._hidden(x)) if gate else self._hidden(x)
        hidden = dropout(hidden, train=train)
        xavier = nn.initializers.xavier_uniform()
        out = nn.Dense(x.shape[-1], dtype=design.dtype, kernel_init=xavier, name="project")(hidden)
        return dropout(out, train=train)

    def _fits_kernels(self, tokens: int, gate: layers.SqueezeExcite | None) -> bool:
        """Whether the hidden layer is made by kernels; its parameters always are by the plain form."""
        asked = self.design.feed_forward == "pallas" and self.design.activation == "gelu"
        fits = tokens == math.prod(self.grid) and self.grid[1] <= _COLUMNS
        return bool(asked and fits and (gate or self.design.local_conv) and not self.is_initializing())

    def _by_kernels(self, x: jax.Array, gate: layers.SqueezeExcite | None) -> jax.Array:
        """The hidden layer, gated: [B, N, D] -> [B, N, M]; the first bias is the kernels', so that its gradient is."""
        from vitcls.models import local_detail  # Pallas, which nobody else needs, takes half a second

        dtype, params = self.design.dtype, self.variables["params"]
        expand, width = params["expand"], self.design.mlp_dim
        local_conv = params.get("local_conv", {"kernel": jnp.zeros((9, width)), "bias": jnp.zeros(width)})  # adds 0
        weights = local_detail.Weights(expand["bias"], local_conv["kernel"].reshape(9, width), local_conv["bias"])
        product = x.astype(dtype) @ expand["kernel"].astype(dtype)
        if gate is None:
            return local_detail.local_detail(self.grid, None, product, weights)
        factors = functools.partial(_factors, gate.clone(parent=None, name=None))
        return local_detail.local_detail(self.grid, factors, product, weights, params["squeeze_excite"])

    def _hidden(self, x: jax.Array) -> jax.Array:
        """The hidden layer before its gate, [B, N, D] -> [B, N, M]."""
        design, act = self.design, layers.activation(self.design.activation)
        xavier = nn.initializers.xavier_uniform()
        hidden = act(nn.Dense(design.mlp_dim, dtype=design.dtype, kernel_init=xavier, name="expand")(x))
        if not design.local_conv:
            return hidden
        split = hidden.shape[1] - math.prod(self.grid)  # 1 with a class token
        token, patches = (jax.lax.slice_in_dim(hidden, *ends, axis=1) for ends in ((0, split), (split, None)))
        on_grid = patches.reshape(-1, *self.grid, design.mlp_dim)  # [B, N, M] -> [B, rows, columns, M]
        local_conv = convolutions.conv(
            design.mlp_dim,
            3,
            groups=design.mlp_dim,
            use_bias=True,
            grouped_conv=design.grouped_conv,
            dtype=design.dtype,
            name="local_conv",
        )
        local = act(local_conv(on_grid))
        return jnp.concatenate([token, patches + local.reshape(patches.shape)], axis=1)


def _factors(gate: layers.SqueezeExcite, params: dict, means: jax.Array) -> jax.Array:
    return gate.apply({"params": params}, means, method="factors")


def _size(hidden_dim: int, depth: int, num_heads: int) -> dict:
    return {"hidden_dim": hidden_dim, "depth": depth, "num_heads": num_heads, "mlp_dim": 4 * hidden_dim}


_SIZES = {
    "tiny": _size(192, 12, 3),
    "small": _size(384, 12, 6),
    "base": _size(768, 12, 12),
    "large": _size(1024, 24, 16),
}
# For images of 32x32 pixels: an 8x8 grid of tokens.
_IMPROVEMENTS = {
    "patch_size": 4,
    "stem": "conv",  # "preservation of local details during serialization" (abstract)
    "position_embedding": "learned",
    "local_conv": True,  # "deep activation functions and residual connections into the feedforward network"
    "squeeze_excite": 0.25,
    "aggregation": "mean_attention",  # g weighs all patches evenly and, added to it, by a learned relevance
    "head_norm": True,  # "fully connected layers and normalization strategies"
    "drop_path": 0.1,
}
_IMPROVED = "Image Classification via an Improved Vision Transformer"
_PLAIN = "Dosovitskiy et al. 2021, arXiv 2010.11929"
PRESETS = {
    f"improved_vit_{size}": Preset(VisionTransformer, _SIZES[size] | _IMPROVEMENTS, _IMPROVED, (32, 32, 3), 100)
    for size in ("tiny", "small", "base")
} | {
    f"vit_{size}_patch{patch}": Preset(
        VisionTransformer, fields | {"patch_size": patch}, _PLAIN, (32, 32, 3) if patch == 4 else (224, 224, 3)
    )
    for size, fields in _SIZES.items()
    for patch in (4, 16, 32)
}
