"""A TFLite model with fewer operations, for the same answers.

With batches of any size TensorFlow's converter leaves norms and activations as operations of their own, on constants
that are first broadcast to the size of the images. Here operations broadcast by themselves, and what changes a channel
alone goes into the layer before: its weights, its bias, its activation. That is faster, and in eight bits also better,
since nothing between a layer and its activation is rounded.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

_BROADCASTING = ("ADD", "SUB", "MUL", "DIV", "MAXIMUM", "MINIMUM")
_MOST_DIMENSIONS = 4  # of what all of these broadcast
_CHANNEL_AXIS = {"CONV_2D": 0, "FULLY_CONNECTED": 0, "DEPTHWISE_CONV_2D": 3}  # of the weights
_CALIBRATED = ("CONV_2D", "DEPTHWISE_CONV_2D")  # whose bias is a whole number in eight bits
_LARGEST_BIAS = 2**30  # of int32, in steps
_NONE, _RELU, _RELU6 = 0, 1, 3  # of ActivationFunctionType
_FLOAT32 = 0  # of TensorType


def fused(model: bytes) -> bytes:
    """The model; graphs besides the first, of loops, stay as they are."""

    def change(graph: "_Graph") -> None:
        graph.broadcast_less()
        for layer in [each for each in graph.operators if graph.kind(each) in _CHANNEL_AXIS]:
            graph.fold_into(layer)
        graph.remove_unused()

    return _changed(model, change)


def with_room_for_biases(model: bytes, ranges: Mapping[str, Mapping[str, np.ndarray]]) -> bytes:
    """The model, for eight bits: no channel has weights that are next to nothing beside its bias.

    A bias is int32 there, in steps of those of the input times those of the channel's weights, and cut off beyond.
    `ranges` are the smallest and largest value of each tensor. The weight that is made larger changes the channel by
    less than 1/30,000 of its bias.
    """

    def change(graph: "_Graph") -> None:
        for layer in graph.operators:
            found = ranges.get(graph.name(layer.inputs[0])) if graph.kind(layer) in _CALIBRATED else None
            if found is not None:
                graph.lift(layer, (max(np.max(found["max"]), 0) - min(np.min(found["min"]), 0)) / 255)
        graph.remove_unused()

    return _changed(model, change)


def _changed(model: bytes, change: Callable[["_Graph"], None]) -> bytes:
    from ai_edge_litert.tools import flatbuffer_utils as flatbuffer

    read = flatbuffer.read_model_from_bytearray(bytearray(model))
    change(_Graph(read, lambda each: flatbuffer.opcode_to_name(read, each.opcodeIndex)))
    return bytes(flatbuffer.convert_object_to_bytearray(read))


@dataclasses.dataclass
class _Channels:
    """What becomes of the channels of a layer: activation(factor * x + bias), float64 [channels] each."""

    factor: np.ndarray
    bias: np.ndarray
    activation: int = _NONE

    def take_up(self, kind: str, value: np.ndarray) -> bool:
        """Does an operation with a constant too, float64 [1] or [channels]; False where that is beyond it."""
        if kind == "MAXIMUM" and self.activation == _NONE and not value.any():
            self.activation = _RELU
        elif kind == "MINIMUM" and self.activation == _RELU and (value == 6).all():
            self.activation = _RELU6
        elif self.activation != _NONE or (kind == "DIV" and not value.all()):
            return False
        elif kind in ("ADD", "SUB"):
            self.bias = self.bias + (value if kind == "ADD" else -value)
        elif kind in ("MUL", "DIV"):
            scale = value if kind == "MUL" else 1 / value
            self.factor, self.bias = self.factor * scale, self.bias * scale
        else:
            return False
        return True


class _Graph:
    """The first graph of a model; `kind` names an operation of it."""

    def __init__(self, model: Any, kind: Callable[[Any], str]):
        self._model, self._graph, self.kind = model, model.subgraphs[0], kind
        self._added: dict[tuple, int] = {}  # constants that layers share, by their values

    @property
    def operators(self) -> list[Any]:
        return self._graph.operators

    def broadcast_less(self) -> None:
        """Operations take the small constant where the other operand has the shape of the result."""
        source = {each.outputs[0]: each.inputs[0] for each in self.operators if self.kind(each) == "BROADCAST_TO"}
        for operator in self.operators:
            if self.kind(operator) in _BROADCASTING:
                for place, other in ((0, 1), (1, 0)):
                    large, whole = operator.inputs[place], operator.inputs[other]
                    shape = self._shape(operator.outputs[0])
                    if large in source and self._shape(whole) == shape and len(shape) <= _MOST_DIMENSIONS:
                        operator.inputs[place] = source[large]

    def fold_into(self, layer: Any) -> None:
        """What follows a layer and changes each of its channels alone becomes part of it."""
        weights = self._constant(layer.inputs[1])
        if weights is None or layer.builtinOptions.fusedActivationFunction != _NONE:
            return
        has_bias = len(layer.inputs) > 2 and layer.inputs[2] >= 0
        axis = _CHANNEL_AXIS[self.kind(layer)]
        count = weights.shape[axis]
        bias = self._constant(layer.inputs[2]) if has_bias else np.zeros(count)
        if bias is None:
            return
        channels, last, changed = _Channels(np.ones(count), bias.astype(np.float64)), layer, False
        for operator in self._only_readers(layer):
            if self.kind(operator) == "RESHAPE" and self._shape(operator.outputs[0])[-1] == count:
                last = operator
                continue
            value = self._of_channels(operator, last.outputs[0], count)
            if value is None or not channels.take_up(self.kind(operator), value):
                break
            last.outputs[0], changed = operator.outputs[0], True
            self.operators.remove(operator)
        if changed:
            shape = [-1 if each == axis else 1 for each in range(weights.ndim)]
            values = weights * channels.factor.reshape(shape), channels.bias
            layer.inputs = [layer.inputs[0], *(self._shared(layer.inputs[1], value) for value in values)]
            layer.builtinOptions.fusedActivationFunction = channels.activation

    def lift(self, layer: Any, step: float) -> None:
        """No channel's bias is more than `_LARGEST_BIAS` steps; `step` is that of the input in eight bits."""
        weights, bias = (self._constant(name) for name in (*layer.inputs, -1)[1:3])
        if weights is None or bias is None or not step:
            return
        least = 127 * np.abs(bias.astype(np.float64)) / (step * _LARGEST_BIAS)
        lifted = weights.copy()
        channels = np.moveaxis(lifted, _CHANNEL_AXIS[self.kind(layer)], 0)  # of the same memory
        for channel in np.flatnonzero(np.abs(channels).max(axis=(1, 2, 3)) < least):
            largest = np.unravel_index(np.abs(channels[channel]).argmax(), channels[channel].shape)
            channels[channel][largest] = np.copysign(least[channel], channels[channel][largest])
        layer.inputs[1] = self._shared(layer.inputs[1], lifted)

    def name(self, tensor: int) -> str:
        return self._graph.tensors[tensor].name.decode()

    def remove_unused(self) -> None:
        """Operations that nobody reads, and the tensors and numbers that none has."""
        graph, model = self._graph, self._model
        while True:
            read = {*graph.outputs, *(name for each in self.operators for name in each.inputs)}
            kept = [each for each in self.operators if not len(each.outputs) or not read.isdisjoint(each.outputs)]
            if len(kept) == len(self.operators):
                break
            graph.operators = kept
        used = {*graph.inputs, *read, *(name for each in kept for name in each.outputs)}
        names = [name for name in range(len(graph.tensors)) if name in used]
        renamed = {name: place for place, name in enumerate(names)} | {-1: -1}  # -1 is none
        graph.tensors = [graph.tensors[name] for name in names]
        for each in (graph, *self.operators):
            each.inputs, each.outputs = ([renamed[name] for name in ends] for ends in (each.inputs, each.outputs))
        for signature in model.signatureDefs:  # which are of the first graph
            for end in (*signature.inputs, *signature.outputs):
                end.tensorIndex = renamed[end.tensorIndex]
        tensors = [each for some in model.subgraphs for each in some.tensors]
        buffers = {each.buffer for each in (*tensors, *(model.metadata or []))}
        for place, buffer in enumerate(model.buffers):
            if place not in buffers:
                buffer.data = None

    def _only_readers(self, operator: Any) -> Iterator[Any]:
        """The one that reads what an operation gives, the one that reads what that gives, and so on."""
        while True:
            output = operator.outputs[0]
            readers = [each for each in self.operators if output in each.inputs]
            if len(readers) != 1 or output in self._graph.outputs:
                return
            operator = readers[0]
            yield operator

    def _of_channels(self, operator: Any, given: int, channels: int) -> np.ndarray | None:
        """The constant that changes `given` in an operation, float64 [1] or [channels]; None for any other."""
        if self.kind(operator) not in _BROADCASTING or len(operator.inputs) != 2:
            return None
        options = operator.builtinOptions
        if getattr(options, "fusedActivationFunction", _NONE) != _NONE:
            return None
        ordered = self.kind(operator) in ("SUB", "DIV")
        if given not in operator.inputs or (ordered and operator.inputs[0] != given):
            return None
        (name,) = [each for each in operator.inputs if each != given] or [None]
        value = None if name is None else self._constant(name)
        if value is None or value.size not in (1, channels) or (value.ndim and value.shape[-1] != value.size):
            return None
        return value.reshape(-1).astype(np.float64)

    def _shape(self, name: int) -> list[int]:
        """With -1 for what is known only when it runs."""
        tensor = self._graph.tensors[name]
        known = tensor.shapeSignature if tensor.shapeSignature is not None else tensor.shape
        return [int(size) for size in known] if known is not None else []

    def _constant(self, name: int) -> np.ndarray | None:
        if name < 0:  # there is none
            return None
        tensor = self._graph.tensors[name]
        data = self._model.buffers[tensor.buffer].data
        if tensor.type != _FLOAT32 or data is None or not len(data):
            return None
        return np.frombuffer(bytes(data), np.float32).reshape(self._shape(name))

    def _shared(self, like: int, value: np.ndarray) -> int:
        """A constant float32, of which there is one for all layers; `like` is one that stands here already."""
        value = np.ascontiguousarray(value, np.float32)
        if np.array_equal(self._constant(like), value):
            return like
        key = value.shape, value.tobytes()
        if key not in self._added:
            self._added[key] = self._add(like, value)
        return self._added[key]

    def _add(self, like: int, value: np.ndarray) -> int:
        """A constant more, with a name of its own."""
        tensor, buffer = copy.copy(self._graph.tensors[like]), copy.copy(self._model.buffers[0])
        buffer.data = np.frombuffer(value.tobytes(), np.uint8)
        tensor.name = f"constant_{len(self._graph.tensors)}".encode()
        tensor.shape, tensor.shapeSignature, tensor.buffer = list(value.shape), None, len(self._model.buffers)
        self._model.buffers.append(buffer)
        self._graph.tensors.append(tensor)
        return len(self._graph.tensors) - 1
