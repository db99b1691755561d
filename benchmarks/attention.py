"""Attention by XLA against the folded form and cuDNN's fused kernel at 64, 197 and 1024 tokens.

    python -m benchmarks.attention --batch=128 --heads=6 --calls=50

Forward, and forward with backward. `attention='auto'` takes cuDNN's where it runs and the folded one on CPUs
(vitcls/models/forms.py). The former needs an NVIDIA GPU and bfloat16, and 197
tokens are padded to 200; elsewhere its columns stay empty. `--calls` shares a dispatch between kernels that take no
longer than one.
"""

import functools
import sys

import jax

from benchmarks import harness
from vitcls import cli
from vitcls.models import attention

TOKENS = (64, 197, 1024)


def main(argv: list[str]) -> None:
    flags = harness.parser(__doc__)
    flags.add_argument("--batch", type=int, default=128)
    flags.add_argument("--heads", type=int, default=6)
    flags.add_argument("--head_dim", type=int, default=64)
    flags.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    flags.add_argument("--calls", type=int, default=1, help="calls in one program")
    args = flags.parse_args(argv)
    implementations = ("xla", "folded")
    if jax.default_backend() == "gpu" and args.dtype == "bfloat16":
        implementations += ("cudnn",)
    rows = []
    for tokens in TOKENS:
        shape = (args.batch, tokens, args.heads, args.head_dim)
        arguments = tuple(jax.random.normal(key, shape, args.dtype) for key in jax.random.split(jax.random.key(0), 3))
        by_name = {
            name: harness.forward_and_backward(functools.partial(attention.attend, form=name), arguments, args.calls)
            for name in implementations
        }
        for direction in ("forward", "forward + backward"):
            turns = {name: by_name[name][direction] for name in implementations}
            timings = harness.alternate(turns, repeats=args.repeats)
            row = {"tokens": tokens, "batch": args.batch, "heads": args.heads, "direction": direction}
            for name in ("xla", "folded", "cudnn"):
                timing = timings.get(name)
                row[f"{name} ms"] = timing and 1e3 * timing.median / args.calls
                row[f"{name} fastest..slowest"] = timing and timing.spread(1e3 / args.calls)
            for name in ("folded", "cudnn"):
                row[f"xla / {name}"] = harness.ratio(timings["xla"], timings[name]) if name in timings else None
            rows.append(row)
    harness.publish("attention", rows, args.out)


if __name__ == "__main__":
    sys.exit(cli.run(main))
