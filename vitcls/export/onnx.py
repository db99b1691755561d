"""A run as one ONNX file, for onnxruntime and what else reads ONNX."""

import collections
import json
import logging
import pathlib
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax import export

from vitcls.core import extras, terminal
from vitcls.core.errors import RunError, UserError

_ABOUT = "vitcls"  # the key of the file's metadata
_INPUT, _OUTPUT = "images", "probabilities"
_PRODUCTS = ["Gemm", "MatMul"]
_QUANTIZED = ["Conv", *_PRODUCTS, "Clip", "Relu"]  # layers with weights, and what onnxruntime makes part of them
_EINSUM = re.compile(r"(\w*)(\w),\2(\w)->\1\3")  # of [..., K] by [K, N], which is a product
_BATCH = 32  # calibration images at a time
_MOST_BYTES = 2**31 - 1  # of a protocol buffer


def write(
    answer: Callable,
    image_shape: tuple[int, int, int],
    about: Mapping[str, Any],
    place: pathlib.Path,
    *,
    precision: str = "float32",
    calibration: np.ndarray | None = None,
) -> None:
    """Writes the file; int8 has weights per output channel, and activations by what `calibration` images give.

    Raises UserError without jax2onnx and for more than ONNX files hold, RunError for what it cannot convert.
    """
    runtime()
    import onnx

    model = _converted(answer, image_shape)
    _as_onnxruntime_knows_it(model)
    _share_constants(model)
    del model.graph.value_info[:]  # jax2onnx says of some padded arrays that their batch is that of the images
    if precision == "int8":
        try:
            model = _quantized(model, calibration)
        except Exception as error:  # of onnxruntime, whose classes have no public name
            raise RunError(f"onnxruntime cannot quantize this network: {str(error)[:200]}") from None
    onnx.helper.set_model_props(model, {_ABOUT: json.dumps(about)})
    if model.ByteSize() > _MOST_BYTES:
        raise UserError("an ONNX file holds at most 2 GB, and this network is larger; take --format=stablehlo")
    place.write_bytes(model.SerializeToString())


def _converted(answer: Callable, image_shape: tuple[int, int, int]) -> Any:
    logging.getLogger("jax2onnx").setLevel(logging.CRITICAL)  # of plugins for what is not here
    logging.getLogger("onnx_ir").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with extras.needed("an ONNX file", "onnx"):
            from jax2onnx import to_onnx
        shape = export.symbolic_shape(f"batch, {', '.join(map(str, image_shape))}")
        images = jax.ShapeDtypeStruct(shape, np.uint8)
        try:
            with terminal.silent(), jax.numpy_rank_promotion("allow"):  # its own arithmetic relies on it
                return to_onnx(answer, [images], input_names=[_INPUT], output_names=[_OUTPUT])
        except Exception as error:  # of any kind, of a converter of hundreds of operations
            said = " ".join(str(error).split())[:200]
            raise RunError(f"jax2onnx cannot make an ONNX file of this network: {said}") from None


def _as_onnxruntime_knows_it(model: Any) -> None:
    """A product with a matrix as MatMul, not Einsum; Max with 0 as Relu, and Min of that with a constant as Clip.

    onnxruntime has faster kernels for these, makes the last two part of the layer before, and quantizes them.
    """
    from onnx import TensorProto, helper, numpy_helper

    nodes = model.graph.node
    floats = [each for each in model.graph.initializer if not each.dims and each.data_type == TensorProto.FLOAT]
    scalars = {each.name: numpy_helper.to_array(each).item() for each in floats}
    readers = collections.Counter(
        [
            *(name for node in _all_nodes(model.graph) for name in node.input),
            *(each.name for each in model.graph.output),
        ]
    )
    relus = {}  # by what they give; with the name of their 0
    for node in list(nodes):
        if node.op_type == "Einsum" and _EINSUM.fullmatch(node.attribute[0].s.decode().replace(" ", "")):
            node.op_type = "MatMul"
            del node.attribute[:]
        elif node.op_type in ("Max", "Min") and len(node.input) == 2:
            given, bound = sorted(node.input, key=scalars.__contains__)
            if node.op_type == "Max" and scalars.get(bound) == 0:
                node.CopyFrom(helper.make_node("Relu", [given], node.output, node.name))
                relus[node.output[0]] = node, bound
            elif node.op_type == "Min" and bound in scalars and given in relus:
                relu, zero = relus[given]
                node.CopyFrom(helper.make_node("Clip", [relu.input[0], zero, bound], node.output, node.name))
                if readers[given] == 1:
                    nodes.remove(relu)


def _share_constants(model: Any) -> None:
    """One for all that have the same values: jax2onnx writes the weights once for each view of an image."""
    from onnx import numpy_helper

    first, kept = {}, {}
    for each in model.graph.initializer:
        kept[each.name] = first.setdefault(
            (each.data_type, *each.dims, numpy_helper.to_array(each).tobytes()), each
        ).name
    for node in _all_nodes(model.graph):
        node.input[:] = [kept.get(name, name) for name in node.input]
    initializers = list(first.values())
    del model.graph.initializer[:]
    model.graph.initializer.extend(initializers)


def _all_nodes(graph: Any) -> Iterator[Any]:
    """Those of a graph and of the graphs inside of its nodes, such as the body of a loop."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _all_nodes(inner)


def _quantized(model: Any, calibration: np.ndarray) -> Any:
    """In eight bits by onnxruntime: QuantizeLinear and DequantizeLinear around the layers with weights.

    Weights are unsigned, around 128: products of unsigned with signed bytes overflow, without a word, on processors
    that have AVX2 or AVX-512 and no VNNI. Products of matrices give floats, which costs no time and loses less.
    """
    import onnx
    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):
        """The calibration images, a batch at a time."""

        def __init__(self):
            starts = range(0, len(calibration), _BATCH)
            self._batches: Iterator = iter([{_INPUT: calibration[i : i + _BATCH]} for i in starts])

        def get_next(self):
            return next(self._batches, None)

    with tempfile.TemporaryDirectory(prefix="vitcls-export-") as folder:
        plain, folded, small = (str(pathlib.Path(folder, f"{name}.onnx")) for name in ("plain", "folded", "small"))
        onnx.save(model, plain)
        _fold(plain, folded)
        logging.getLogger().disabled, was = True, logging.getLogger().disabled
        try:
            quantization.quantize_static(
                folded,
                small,
                Reader(),
                per_channel=True,
                quant_format=quantization.QuantFormat.QDQ,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QUInt8,
                op_types_to_quantize=_QUANTIZED,
                extra_options={"WeightSymmetric": True, "OpTypesToExcludeOutputQuantization": _PRODUCTS},
            )
        finally:
            logging.getLogger().disabled = was
        return onnx.load(small)


def _fold(plain: str, folded: str) -> None:
    """Computes what no image changes, such as transposed kernels, so that weights stand at the layers they are of."""
    options = runtime().SessionOptions()
    options.graph_optimization_level = runtime().GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = folded
    options.log_severity_level = 3
    runtime().InferenceSession(plain, options, providers=["CPUExecutionProvider"])


def runtime() -> Any:
    """The module onnxruntime; raises UserError where there is none."""
    with extras.needed("an ONNX file", "onnx"):
        import onnxruntime
    return onnxruntime


def load(path: str) -> tuple[Callable[[np.ndarray], np.ndarray], dict[str, Any]]:
    """answer(images) by onnxruntime on the CPU, and what the file is; raises OSError or ValueError for what is none."""
    module = runtime()
    try:
        session = module.InferenceSession(path, providers=["CPUExecutionProvider"])
    except Exception as error:  # of onnxruntime, whose classes have no public name
        raise ValueError(str(error)) from None
    about = json.loads(session.get_modelmeta().custom_metadata_map[_ABOUT])
    return lambda images: session.run([_OUTPUT], {_INPUT: images})[0], about
