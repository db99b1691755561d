"""What the writers of TFLite and ONNX make of a function's graph: fewer operations, and eight bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.export.test_formats import NEEDS
from vitcls.export import artefact, make, onnx, tflite


@pytest.mark.parametrize("format", NEEDS)
def test_in_eight_bits_nothing_is_cut_off(format, tmp_path):
    """One white image among dark ones counts for the range, and sums of the largest products do not overflow."""
    pytest.importorskip(NEEDS[format])
    writer, place = {"tflite": tflite, "onnx": onnx}[format], tmp_path / f"file{make.FORMATS[format].ending}"

    def answer(images):
        kernel = jnp.ones((3, 3, 3, 8)) / 27
        maps = jax.lax.conv_general_dilated(
            images.astype(jnp.float32) / 255, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jnp.clip(maps, 0, 6).mean(axis=(1, 2))

    images = np.full((40, 8, 8, 3), 10, np.uint8)
    images[0] = 255
    about = {"classes": ["a"], "image_shape": [8, 8, 3]}
    writer.write(answer, (8, 8, 3), about, place, precision="int8", calibration=images)
    np.testing.assert_allclose(artefact.load(str(place)).answer(images[:2]), answer(images[:2]), atol=0.01)


@pytest.mark.parametrize("format", NEEDS)
def test_in_eight_bits_a_channel_without_weights_keeps_its_bias(format, tmp_path):
    """As of a norm that has died, or a filter that was pruned."""
    pytest.importorskip(NEEDS[format])
    writer, place = {"tflite": tflite, "onnx": onnx}[format], tmp_path / f"file{make.FORMATS[format].ending}"
    draw = np.random.default_rng(0)
    kernel, slim = (draw.uniform(0, 0.2, size).astype(np.float32) for size in ((3, 3, 3, 8), (3, 3, 1, 8)))
    gains = np.array([[[[1, 0, 1e-3, 1e-5, -1e-6, 1e-8, 1, 0]]]], np.float32)
    shifts = np.full((1, 1, 1, 8), 2, np.float32)

    def layer(x, kernel, groups):
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "VALID", dimension_numbers=layout, feature_group_count=groups
        )

    def answer(images):
        x = jax.nn.relu(layer(images.astype(jnp.float32) / 255, kernel, 1) * gains + shifts)
        return jax.nn.relu(layer(x, slim, 8) * gains[..., ::-1] - gains + shifts).mean(axis=(1, 2))

    images = draw.integers(0, 256, (40, 8, 8, 3), np.uint8)
    about = {"classes": ["a"], "image_shape": [8, 8, 3]}
    writer.write(answer, (8, 8, 3), about, place, precision="int8", calibration=images)
    np.testing.assert_allclose(artefact.load(str(place)).answer(images), answer(images), atol=0.03)


@pytest.mark.parametrize("format", NEEDS)
def test_weights_are_in_a_file_once_however_many_views_there_are(format, tmp_path):
    pytest.importorskip(NEEDS[format])
    writer = {"tflite": tflite, "onnx": onnx}[format]
    kernel = np.random.default_rng(0).normal(size=(3, 3, 3, 400)).astype(np.float32)
    means = np.linspace(-1, 1, 400, dtype=np.float32).reshape(1, 1, 1, -1)

    def view(images, factor):
        maps = jax.lax.conv_general_dilated(
            images.astype(jnp.float32) * np.float32(factor / 255),
            kernel.copy(),
            (1, 1),
            "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return jnp.maximum((maps - means) / (means * means + 1), 0).mean(axis=(1, 2))

    answers = {n: lambda images, n=n: sum(view(images, 1 / i) for i in range(1, n + 1)) for n in (1, 4)}
    sizes, images = {}, np.random.default_rng(1).integers(0, 256, (2, 8, 8, 3), np.uint8)
    for count, answer in answers.items():
        place = tmp_path / f"{count}{make.FORMATS[format].ending}"
        writer.write(answer, (8, 8, 3), {"classes": ["a"], "image_shape": [8, 8, 3]}, place)
        sizes[count] = place.stat().st_size
        np.testing.assert_allclose(artefact.load(str(place)).answer(images), answer(images), rtol=1e-4, atol=1e-4)
    assert kernel.nbytes < sizes[1] and sizes[4] < sizes[1] + kernel.nbytes / 2


def test_tflite_has_fewer_operations_for_the_same_answers(tmp_path):
    """What changes a channel alone is part of the layer before it, and nothing else is."""
    pytest.importorskip("ai_edge_litert")
    draw = np.random.default_rng(0)
    stem, depthwise, dense = (
        draw.normal(size=size).astype(np.float32) for size in ((3, 3, 3, 8), (3, 3, 1, 8), (8, 5))
    )
    means, scales = (draw.uniform(0.5, 2, size=(1, 1, 1, 8)).astype(np.float32) for _ in range(2))
    square, zero_once = draw.normal(size=(5, 5)).astype(np.float32), np.array([[[[1, 0, 2, 1, 1]]]], np.float32)

    def conv(x, kernel, groups):
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=layout, feature_group_count=groups
        )

    def answer(images):
        x = conv(images.astype(jnp.float32) / 255, stem, 1)
        x = jnp.minimum(jnp.maximum((x - means) * scales + means, 0), 6)  # a norm and ReLU6
        x = jnp.maximum(conv(x, depthwise, 8) / scales, 0) * scales  # ReLU, and a factor that stays behind it
        x = means - conv(x, depthwise, 8)  # not a difference from the layer
        y = conv(x, depthwise, 8)
        x = jnp.maximum(y + scales, 0.5) + y  # two readers; and no ReLU
        maps = jnp.minimum(x @ dense + 1, 6)  # no ReLU6
        maps = jnp.minimum(jnp.maximum((maps @ square) / zero_once, 0), 6)  # no factor, of which one would be endless
        return jax.lax.fori_loop(0, 3, lambda _, y: jnp.maximum(0.1 * (y @ square) + 1, 0), maps.mean(axis=(1, 2)))

    place = tmp_path / "file.tflite"
    tflite.write(answer, (9, 8, 3), {"classes": ["a"], "image_shape": [9, 8, 3]}, place)
    from ai_edge_litert.tools import flatbuffer_utils as flatbuffer

    model = flatbuffer.read_model(str(place))
    operators = model.subgraphs[0].operators
    kinds = [flatbuffer.opcode_to_name(model, each.opcodeIndex) for each in operators]
    layers = [each for each, kind in zip(operators, kinds, strict=True) if "CONV" in kind or "FULLY" in kind]
    assert [each.builtinOptions.fusedActivationFunction for each in layers] == [3, 1, 0, 0, 0, 0]  # ReLU6, ReLU, none
    assert len(model.subgraphs) > 1  # a loop, which stays as it is
    assert "BROADCAST_TO" not in kinds and kinds.count("MUL") == kinds.count("SUB") == 1
    assert kinds.count("MAXIMUM") == kinds.count("MINIMUM") == 2
    images = draw.integers(0, 256, (3, 9, 8, 3), np.uint8)
    found = artefact.load(str(place)).answer
    for batch in (images, images[:1]):
        np.testing.assert_allclose(found(batch), answer(batch), rtol=1e-5, atol=1e-5)


def test_onnx_has_the_operations_that_onnxruntime_knows():
    pytest.importorskip("jax2onnx")
    import onnx as library
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    def branch(name):
        node = helper.make_node("Identity", [name], [f"{name} of a branch"])
        given = helper.make_tensor_value_info(f"{name} of a branch", TensorProto.FLOAT, [None, 3])
        return helper.make_graph([node], name, [], [given])

    def model():
        nodes = [
            helper.make_node("Max", ["zero", "x"], ["seen inside"], "seen inside"),
            helper.make_node("Min", ["seen inside", "six"], ["seen as well"], "seen as well"),
            helper.make_node(
                "If", ["yes"], ["chosen"], "chosen", then_branch=branch("seen inside"), else_branch=branch("x")
            ),
            helper.make_node("Max", ["zero", "x"], ["relu"], "relu"),
            helper.make_node("Max", ["x", "zero"], ["low"], "low"),
            helper.make_node("Min", ["low", "six"], ["relu6"], "relu6"),
            helper.make_node("Min", ["relu", "one"], ["clipped"], "clipped"),
            helper.make_node("Max", ["x", "one"], ["at least one"], "at least one"),
            helper.make_node("Min", ["x", "six"], ["at most six"], "at most six"),
            helper.make_node("Max", ["x", "zeros"], ["of many zeros"], "of many zeros"),
            helper.make_node("Cast", ["x"], ["whole"], "whole", to=TensorProto.INT64),
            helper.make_node("Max", ["whole", "whole zero"], ["whole, not below 0"], "whole, not below 0"),
        ]
        constants = {"zero": 0, "one": 1, "six": 6, "zeros": [0, 0, 0]}
        floats = [node.output[0] for node in nodes[:-2] if node.name not in ("low", "seen inside")]
        outputs = [*((name, TensorProto.FLOAT) for name in floats), (nodes[-1].name, TensorProto.INT64)]
        graph = helper.make_graph(
            nodes,
            "graph",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 3])],
            [helper.make_tensor_value_info(*each, [None, 3]) for each in outputs],
            [
                *(numpy_helper.from_array(np.array(value, np.float32), name) for name, value in constants.items()),
                numpy_helper.from_array(np.array(0, np.int64), "whole zero"),
                numpy_helper.from_array(np.array(True), "yes"),
            ],
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)

    def answers(model):
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        return session.run(None, {"x": np.linspace(-9, 9, 30, dtype=np.float32).reshape(10, 3)})

    made = model()
    onnx._as_onnxruntime_knows_it(made)
    library.checker.check_model(made)
    kinds = {node.output[0]: node.op_type for node in made.graph.node}
    assert kinds == {
        "seen inside": "Relu",
        "seen as well": "Clip",
        "chosen": "If",
        "relu": "Relu",
        "relu6": "Clip",
        "clipped": "Clip",
        "at least one": "Max",
        "at most six": "Min",
        "of many zeros": "Max",
        "whole": "Cast",
        "whole, not below 0": "Max",
    }
    for found, expected in zip(answers(made), answers(model()), strict=True):
        np.testing.assert_array_equal(found, expected)
