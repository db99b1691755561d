"""What a compiled program launches, moves and multiplies, read from its text.

For every kernel the bytes of its operands and results and the FLOPs of its products are added up, loops by their
trips. Its ceiling is what a GPU would need at the least, `max(bytes / bandwidth, FLOPs / peak) + launch`: it shows what
a change saves, not how fast a kernel is.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4}
BYTES |= {"f64": 8, "s64": 8, "u64": 8}
_ARRAY = re.compile(rf"\b({'|'.join(BYTES)})\[([0-9,]*)\]")
_SHAPE = r"\(.*?\)|[a-z0-9]+\[[^\]]*\](?:\{[^}]*\})?"
_LINE = re.compile(rf"^(?:ROOT )?%?([\w.\-]+) = ({_SHAPE}) ([\w\-]+)\((.*)$")
_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{")
# What is no kernel: names for parts of memory, and the second halves of what runs asynchronously.
_FREE = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id", "replica-id"}
_FREE |= {"async-done", "copy-done", "add-dependency", *(f"{kind}-done" for kind in COLLECTIVES)}


class Chip(NamedTuple):
    """What kernels of a kind of GPU reach at best."""

    bandwidth: float  # bytes/s
    peak: float  # FLOP/s of bfloat16 products
    launch: float = 2e-6  # seconds between two kernels


CHIPS = {"h100": Chip(2.8e12, 6e14)}


class Kernel(NamedTuple):
    """One kernel of a program and how often it runs."""

    kind: str  # 'product', 'convolution', 'attention', 'loop', 'reduction', a collective, ...
    moved: int  # bytes
    flops: int
    times: int
    name: str  # what JAX calls it: 'jit(f)/jvp(Model)/block_0/attention/dot_general'

    def seconds(self, chip: Chip) -> float:
        """The ceiling of all its runs."""
        return self.times * (max(self.moved / chip.bandwidth, self.flops / chip.peak) + chip.launch)


class _Instruction(NamedTuple):
    shape: str
    op: str
    rest: str  # operands and attributes

    @property
    def operands(self) -> list[str]:
        return list(dict.fromkeys(re.findall(r"%([\w.\-]+)", self.rest.split(")")[0])))

    def attribute(self, pattern: str) -> str | None:
        found = re.search(pattern, self.rest)
        return found[1] if found else None


_Computation = dict[str, _Instruction]


class _Collective(NamedTuple):
    kind: str
    moved: int  # bytes of the results of all its runs
    name: str
    channel: str | None  # of one inside a fusion


def kernels(text: str) -> list[Kernel]:
    """Every kernel of a compiled program, given as text."""
    program = _Program(*_parse(text))
    return list(program.walk(program.entry, 1))


def _parse(text: str) -> tuple[dict[str, _Computation], str]:
    computations: dict[str, _Computation] = {}
    current: _Computation | None = None
    entry = ""
    for line in text.splitlines():
        head = _HEAD.match(line)
        if head and not line.startswith(" "):
            current = computations.setdefault(head[2], {})
            entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (found := _LINE.match(line.strip())):
            current[found[1]] = _Instruction(*found.groups()[1:])
    return computations, entry


@dataclasses.dataclass(frozen=True)
class _Program:
    computations: dict[str, _Computation]
    entry: str

    def walk(self, name: str, times: int) -> Iterator[Kernel]:
        for instruction in self.computations[name].values():
            if instruction.op in _FREE:
                continue
            if instruction.op == "while":
                trips = self._trips(self.computations[name], instruction) or 1
                yield from self.walk(instruction.attribute(r"body=%?([\w.\-]+)"), times * trips)
            elif instruction.op in ("call", "async-start"):
                inner = instruction.attribute(r"(?:to_apply|calls)=%?([\w.\-]+)")
                if inner in self.computations:
                    yield from self.walk(inner, times)
            elif instruction.op == "conditional":  # the costliest of the branches
                listed = instruction.attribute(r"branch_computations=\{([^}]*)\}")
                names = re.findall(r"[\w.\-]+", listed or "") + re.findall(
                    r"(?:true|false)_computation=%?([\w.\-]+)", instruction.rest
                )
                branches = [list(self.walk(branch, times)) for branch in names if branch in self.computations]
                yield from max(branches, key=lambda branch: sum(kernel.moved for kernel in branch), default=[])
            else:
                yield self._kernel(self.computations[name], instruction, times)

    def sent(self, name: str, times: int, *, fused: bool = False) -> Iterator[_Collective]:
        """The collectives of a computation that runs so often, and of all inside it."""
        for label, instruction in self.computations.get(name, {}).items():
            kind = instruction.op.removesuffix("-start")
            if kind in COLLECTIVES:
                channel = instruction.attribute(r"channel_id=(\d+)") if fused else None
                yield _Collective(kind, times * _result_bytes(instruction), label, channel)
                continue
            fuses = fused or instruction.op == "fusion"
            inner = [found for each in self._called(instruction) for found in self.sent(each, times, fused=fuses)]
            if inner and instruction.op == "while":
                trips = self._trips(self.computations[name], instruction)
                if trips is None:
                    raise ValueError(f"how often does the loop {label} run, which has collectives?")
                inner = [found._replace(moved=trips * found.moved) for found in inner]
            if "reduce-scatter" in instruction.rest and [found.kind for found in inner] == ["all-reduce"]:
                inner = [inner[0]._replace(kind="reduce-scatter", moved=times * _bytes(instruction.shape))]
            yield from inner

    def _trips(self, around: _Computation, loop: _Instruction) -> int | None:
        """How often a loop runs: as the compiler says, or of one that counts to a constant; None if neither."""
        known = loop.attribute(r'known_trip_count":\{"n":"(\d+)"')
        if known:
            return int(known)
        condition = self.computations[loop.attribute(r"condition=%?([\w.\-]+)")]
        body = self.computations[loop.attribute(r"body=%?([\w.\-]+)")]
        compared = list(condition.values())[-1]
        if compared.op != "compare" or "direction=LT" not in compared.rest:
            return None
        counter, limit = compared.operands[:2]
        place = int(condition[counter].attribute(r"index=(\d+)") or 0)
        first = _constant(around, _element(around.get(loop.operands[0]), place))
        last, step = _constant(condition, limit), _added(body, _element(list(body.values())[-1], place))
        return None if None in (first, last, step) else -(-(last - first) // step)

    @staticmethod
    def _called(instruction: _Instruction) -> list[str]:
        listed = instruction.attribute(r"branch_computations=\{([^}]*)\}") or ""
        single = r"(?:body|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
        return [*re.findall(r"[\w.\-]+", listed), *re.findall(single, instruction.rest)]

    def _kernel(self, around: _Computation, instruction: _Instruction, times: int) -> Kernel:
        shapes = [around[operand].shape for operand in instruction.operands if operand in around]
        moved = _bytes(instruction.shape) + sum(map(_bytes, shapes))
        kind, flops = instruction.op.removesuffix("-start"), 0
        if instruction.op == "fusion":
            inner = self.computations[instruction.attribute(r"calls=%?([\w.\-]+)")]
            flops = self._product_flops(inner)
            reduces = any(each.op == "reduce" for each in inner.values())
            kind = "product" if flops else "reduction" if reduces else "loop"
        elif instruction.op == "dot":
            kind, flops = "product", _dot_flops(instruction, shapes)
        elif instruction.op == "custom-call":
            kind, flops = _custom_call(instruction, shapes)
        return Kernel(kind, moved, flops, times, instruction.attribute(r'op_name="([^"]*)"') or "")

    def _product_flops(self, inner: _Computation) -> int:
        flops = 0
        for instruction in inner.values():
            if instruction.op == "dot":
                shapes = [inner[operand].shape for operand in instruction.operands if operand in inner]
                flops += _dot_flops(instruction, shapes)
            elif instruction.op in ("fusion", "call"):
                called = instruction.attribute(r"(?:calls|to_apply)=%?([\w.\-]+)")
                flops += self._product_flops(self.computations.get(called, {}))
        return flops


def _constant(computation: _Computation, name: str) -> int | None:
    """The value of a whole number, or of a copy of it; None for what is computed."""
    instruction = computation.get(name)
    if instruction is not None and instruction.op == "copy":
        return _constant(computation, instruction.operands[0])
    if instruction is None or instruction.op != "constant":
        return None
    found = re.match(r"-?\d+(?=\))", instruction.rest)
    return int(found[0]) if found else None


def _element(made: _Instruction | None, index: int) -> str:
    """The name of an element of a tuple, '' of what is none."""
    if made is None or made.op != "tuple":
        return ""
    return re.findall(r"%([\w.\-]+)", made.rest.split(")")[0])[index]


def _added(computation: _Computation, name: str) -> int | None:
    """What an addition adds to its other operand; None for anything else."""
    instruction = computation.get(name)
    if instruction is None or instruction.op != "add":
        return None
    numbers = [_constant(computation, operand) for operand in instruction.operands]
    return next((number for number in numbers if number is not None), None)


def _dims(shape: str) -> list[int]:
    """Of the first array of a shape."""
    found = re.search(r"\[([0-9,]*)\]", shape)
    return [int(size) for size in found[1].split(",") if size] if found else []


def _bytes(shape: str) -> int:
    shape = re.sub(r"s8\[\d+\]", "", shape) if shape.startswith("(") else shape  # the workspace of a library's kernel
    return sum(
        BYTES[dtype] * math.prod(int(size) for size in dims.split(",") if size) for dtype, dims in _ARRAY.findall(shape)
    )


def _dot_flops(instruction: _Instruction, shapes: list[str]) -> int:
    contracted = instruction.attribute(r"lhs_contracting_dims=\{([0-9,]*)\}") or ""
    return _product(instruction.shape, shapes, re.findall(r"\d+", contracted))


def _product(result: str, shapes: list[str], contracted: list[str]) -> int:
    left = _dims(shapes[0]) if shapes else []
    return 2 * math.prod(_dims(result)) * math.prod(left[int(axis)] for axis in contracted if int(axis) < len(left))


def _custom_call(instruction: _Instruction, shapes: list[str]) -> tuple[str, int]:
    """(kind, FLOPs) of a kernel of a library."""
    target = instruction.attribute(r'custom_call_target="([^"]+)"') or ""
    if "gemm" in target or "matmul" in target:
        contracted = instruction.attribute(r'"lhs_contracting_dimensions":\[([^\]]*)\]') or ""
        return "product", _product(instruction.shape, shapes, re.findall(r"\d+", contracted))
    if "$conv" in target:
        return "convolution", _convolution_flops(target, instruction, shapes)
    if "fmha" in target:
        return "attention", _attention_flops(target, instruction, shapes)
    if "triton" in target:
        return "pallas", 0
    return target, 0


def _convolution_flops(target: str, instruction: _Instruction, shapes: list[str]) -> int:
    """2 x the places of the result of the forward pass x the products of each, whichever of the three passes it is."""
    labels = instruction.attribute(r"dim_labels=([\w?]+->[\w?]+)")
    if labels is None or len(shapes) < 2:
        return 0
    kernel_labels = labels.split("_")[1].split("->")[0]
    result = _dims(instruction.shape)
    if "BackwardFilter" in target:
        outputs, kernel = _dims(shapes[1]), result
    elif "BackwardInput" in target:
        outputs, kernel = _dims(shapes[0]), _dims(shapes[1])
    else:
        outputs, kernel = result, _dims(shapes[1])
    return 2 * math.prod(outputs) * math.prod(kernel) // kernel[kernel_labels.index("o")]


def _attention_flops(target: str, instruction: _Instruction, shapes: list[str]) -> int:
    """Two products forward; five backward, which makes the scores again. Queries are [B, N, heads, D]."""
    batch, tokens, heads, dim = (_dims(shapes[0]) + [0] * 4)[:4]
    products = 5 if "Backward" in target else 2
    return products * 2 * batch * heads * tokens**2 * dim


def part_of(name: str) -> str:
    """The part of the network that a kernel's name says, numbers left out, and its pass: 'block/attention backward'.

    'step' is what belongs to no module: the optimizer, the augmentation, the guards.
    """
    parts = name.split("/")
    module = next((i for i, part in enumerate(parts) if re.search(r"jvp\([A-Z]\w*\)", part)), None)
    if module is None:
        scoped = [part for part in parts if part in ("augmentation", "optimizer")]
        return scoped[0] if scoped else "step"
    direction = "backward" if parts[module].startswith("transpose") else "forward"
    inside = [re.sub(r"_?\d+", "", part) for part in parts[module + 1 : -1] if re.fullmatch(r"[a-z]\w*", part)]
    inside = [part for part in inside if part not in ("checkpoint", "rematted_computation", "closed_call", "while")]
    return f"{'/'.join(inside[:2]) or 'model'} {direction}"


def by_part(found: list[Kernel], chip: Chip) -> dict[str, float]:
    """Ceiling seconds by part of the network, the longest first."""
    return _summed(found, chip, lambda kernel: part_of(kernel.name))


def by_kind(found: list[Kernel], chip: Chip) -> dict[str, float]:
    """Ceiling seconds by kind of kernel, the longest first."""
    return _summed(found, chip, lambda kernel: kernel.kind)


def _summed(found: list[Kernel], chip: Chip, key) -> dict[str, float]:
    seconds: collections.Counter[str] = collections.Counter()
    for kernel in found:
        seconds[key(kernel)] += kernel.seconds(chip)
    return dict(seconds.most_common())


def collectives(text: str) -> dict[str, int]:
    """How many collectives of each kind a compiled program has."""
    return dict(sorted(collections.Counter(found.kind for found in _collectives(text)).items()))


def collective_bytes(text: str) -> dict[str, int]:
    """Bytes of the results of every kind of collective that one run of a compiled program makes on one device.

    Collectives inside loops count once for every trip, those inside conditionals once for every branch, those that the
    compiler has fused with a product or a slice as what they were before: an all-reduce of which each device keeps its
    slice is a reduce-scatter. Of one that runs asynchronously the result counts, not the operand beside it, and once,
    though every fusion beside which it runs shows it: they share its channel.
    """
    totals: collections.Counter[str] = collections.Counter()
    for found in _collectives(text):
        totals[found.kind] += found.moved
    return dict(sorted(totals.items()))


def _collectives(text: str) -> list[_Collective]:
    program = _Program(*_parse(text))
    names: dict[str, str] = {}  # of the instruction that stands for a channel
    found = program.sent(program.entry, 1)
    return [each for each in found if names.setdefault(each.channel or each.name, each.name) == each.name]


def _result_bytes(instruction: _Instruction) -> int:
    """Of a collective; the first half of an asynchronous one has (operands, results, counters) for a result."""
    if not instruction.op.endswith("-start") or instruction.op == "all-reduce-start":
        return _bytes(instruction.shape)
    arrays = [array for array in _ARRAY.findall(instruction.shape) if array != ("u32", "")]
    return sum(_bytes(f"{dtype}[{dims}]") for dtype, dims in arrays[len(arrays) // 2 :])


def wire_bytes(result_bytes: dict[str, int], devices: int) -> float:
    """What each of `devices` sends for collectives over all of them, by the algorithm that sends least: a ring.

    An all-reduce of B bytes is 2 B (N - 1) / N, an all-gather to B bytes and an all-to-all of B are B (N - 1) / N, a
    reduce-scatter to B bytes is B (N - 1), a permutation B.
    """
    share = (devices - 1) / devices
    factors = {"all-reduce": 2 * share, "reduce-scatter": devices - 1, "collective-permute": 1}
    return sum(moved * factors.get(kind, share) for kind, moved in result_bytes.items())
