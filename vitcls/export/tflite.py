"""A run as one file of LiteRT (TensorFlow Lite), for phones and small boards."""

import json
import pathlib
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from vitcls.core import extras, terminal
from vitcls.core.errors import RunError
from vitcls.export import fusing, saved_model

ABOUT, LABELS = "about.json", "labels.txt"
# In eight bits are convolutions and the products of attention, with the range of activations by calibration, and dense
# layers, which find it for each row as they run. Everything else loses more than it saves.
_CALIBRATED = ("CONV_2D", "DEPTHWISE_CONV_2D", "BATCH_MATMUL")
_DENSE = "FULLY_CONNECTED"  # convolutions of 1x1 too


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

    What it is goes with it as TFLite's associated files do: a zip behind the model, which LiteRT does not read.
    """
    interpreter()
    model = fusing.fused(_converted(answer, image_shape))
    if precision == "float16":
        model = _halved(model)
    if precision == "int8":
        model = _quantized(model, calibration)
    place.write_bytes(model)
    with zipfile.ZipFile(place, "a") as archive:
        for name, text in ((ABOUT, json.dumps(about, indent=2)), (LABELS, "\n".join(about["classes"]))):
            archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), text)


def _converted(answer: Callable, image_shape: tuple[int, int, int]) -> bytes:
    with tempfile.TemporaryDirectory(prefix="vitcls-export-") as folder:
        place = pathlib.Path(folder, "saved")
        saved_model.write(answer, image_shape, {}, place, platforms=("cpu",))
        import tensorflow as tf

        converter = tf.lite.TFLiteConverter.from_saved_model(str(place))
        try:
            with terminal.silent():
                return bytes(converter.convert())
        except Exception as error:  # of the converter, whose classes have no public name
            said = " ".join(str(error).split())[:200]
            raise RunError(f"TensorFlow cannot make a TFLite file of this network: {said}") from None


def _halved(model: bytes) -> bytes:
    """With the weights of its layers as float16, by ai-edge-quantizer; LiteRT makes them float32 again as it starts."""
    with extras.needed("float16 for TFLite", "tflite"):
        from ai_edge_quantizer import qtyping, quantizer
    found = quantizer.Quantizer(model)
    found.update_quantization_recipe(
        ".*",
        qtyping.TFLOperationName.ALL_SUPPORTED,
        qtyping.OpQuantizationConfig(
            weight_tensor_config=qtyping.TensorQuantizationConfig(num_bits=16, dtype=qtyping.TensorDataType.FLOAT),
            compute_precision=qtyping.ComputePrecision.FLOAT,
            explicit_dequantize=True,
        ),
        "float_casting",
    )
    with terminal.silent():
        return bytes(found.quantize().quantized_model)


def _quantized(model: bytes, calibration: np.ndarray) -> bytes:
    """In eight bits by ai-edge-quantizer: symmetric weights per channel, activations from the smallest to largest."""
    with extras.needed("int8 for TFLite", "tflite"):
        from ai_edge_quantizer import calibrator, qtyping, quantizer, recipe_manager
    recipe = recipe_manager.RecipeManager()
    for name in _CALIBRATED:
        recipe.add_static_config(".*", qtyping.TFLOperationName(name), activation_num_bits=8, weight_num_bits=8)
    recipe.add_dynamic_config(".*", qtyping.TFLOperationName(_DENSE), num_bits=8)
    with terminal.silent(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it keeps all tensors, which it means to
        found = calibrator.Calibrator(model, qsv_update_func=_widest)
        try:
            found.calibrate({"serving_default": [{saved_model.NAME: image[None]} for image in calibration]}, recipe)
            ranges = found.get_model_qsvs()
            roomy = fusing.with_room_for_biases(model, ranges)
            made = quantizer.Quantizer(roomy, recipe.get_quantization_recipe()).quantize(ranges)
        except Exception as error:  # of ai-edge-quantizer, whose classes have no public name
            said = " ".join(str(error).split())[:200]
            raise RunError(f"ai-edge-quantizer cannot quantize this network: {said}") from None
        return bytes(made.quantized_model)


def _widest(before: dict[str, np.ndarray], now: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The range of two images: by itself ai-edge-quantizer takes a mean over images, which cuts half of them off."""
    return {"min": np.minimum(before["min"], now["min"]), "max": np.maximum(before["max"], now["max"])}


def interpreter() -> type:
    """LiteRT's; raises UserError where there is none."""
    with extras.needed("a TFLite file", "tflite"):
        from ai_edge_litert.interpreter import Interpreter
    return Interpreter


def load(path: str) -> tuple[Callable[[np.ndarray], np.ndarray], dict[str, Any]]:
    """answer(images) by LiteRT, and what the file is; raises OSError or ValueError for what is none."""
    with zipfile.ZipFile(path) as archive:
        about = json.loads(archive.read(ABOUT))
    model = interpreter()(model_path=path)
    (given,), (gives,) = model.get_input_details(), model.get_output_details()

    def answer(images: np.ndarray) -> np.ndarray:
        if tuple(model.get_input_details()[0]["shape"]) != images.shape:
            model.resize_tensor_input(given["index"], images.shape)
            model.allocate_tensors()
        model.set_tensor(given["index"], images)
        model.invoke()
        return model.get_tensor(gives["index"])

    model.allocate_tensors()
    return answer, about
