"""Attention by XLA against cuDNN's fused kernel at 64, 197 and 1024 tokens, forward and backward.

    python -m benchmarks.attention --batch=128 --heads=6

The faster belongs into the presets as `attention`. cuDNN needs an NVIDIA GPU; elsewhere its columns stay empty.
"""

import functools
import sys

import jax
import jax.numpy as jnp

from benchmarks import harness
from vitcls import cli

TOKENS = (64, 197, 1024)


def calls(implementation: str, shape: tuple[int, int, int, int], dtype: str):
    """Forward, and forward and backward, of attention on [batch, tokens, heads, head_dim]."""
    arguments = [jax.random.normal(key, shape, dtype) for key in jax.random.split(jax.random.key(0), 3)]
    attend = functools.partial(jax.nn.dot_product_attention, implementation=implementation)
    gradients = jax.grad(lambda q, k, v: jnp.sum(jnp.sin(attend(q, k, v).astype(jnp.float32))), argnums=(0, 1, 2))
    return {
        "forward": functools.partial(jax.jit(attend), *arguments),
        "forward + backward": functools.partial(jax.jit(gradients), *arguments),
    }


def main(argv: list[str]) -> None:
    flags = harness.parser(__doc__)
    flags.add_argument("--batch", type=int, default=128)
    flags.add_argument("--heads", type=int, default=6)
    flags.add_argument("--head_dim", type=int, default=64)
    flags.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    args = flags.parse_args(argv)
    implementations = ("xla", "cudnn") if jax.default_backend() == "gpu" else ("xla",)
    rows = []
    for tokens in TOKENS:
        shape = (args.batch, tokens, args.heads, args.head_dim)
        by_name = {name: calls(name, shape, args.dtype) for name in implementations}
        for direction in ("forward", "forward + backward"):
            turns = {name: by_name[name][direction] for name in implementations}
            timings = harness.alternate(turns, repeats=args.repeats)
            row = {"tokens": tokens, "batch": args.batch, "heads": args.heads, "direction": direction}
            for name in ("xla", "cudnn"):
                timing = timings.get(name)
                row[f"{name} ms"] = timing and 1e3 * timing.median
                row[f"{name} fastest..slowest"] = timing and timing.spread()
            row["xla / cudnn"] = harness.ratio(timings["xla"], timings["cudnn"]) if "cudnn" in timings else None
            rows.append(row)
    harness.publish("attention", rows, args.out)


if __name__ == "__main__":
    sys.exit(cli.run(main))
