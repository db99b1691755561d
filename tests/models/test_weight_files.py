"""Files of weights: what is right is read to the bit, and what is damaged or hostile is one line."""

import json
import struct
import zipfile

import jax
import numpy as np
import pytest
from flax import traverse_util

from tests.models import test_from_torch
from vitcls import models
from vitcls.core.errors import UserError
from vitcls.models.weights import load
from vitcls.models.weights.from_npz import from_npz
from vitcls.models.weights.from_torch import from_torch

ARRAYS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b.weight": np.arange(4, dtype=np.float16),
    "count": np.array(7, np.int64),
}
_NAMES = {"float32": "F32", "float16": "F16", "int64": "I64", "uint16": "BF16"}


def safetensors(path, arrays=ARRAYS, change=lambda header: header, text=None, cut=0, size=None):
    """A file as the format's page describes it; `change` spoils its header."""
    header, body = {}, b""
    for name, array in arrays.items():
        data = array.tobytes()
        offsets = [len(body), len(body) + len(data)]
        header[name] = {"dtype": _NAMES[array.dtype.name], "shape": list(array.shape), "data_offsets": offsets}
        body += data
    text = json.dumps(change(header)).encode() if text is None else text
    whole = struct.pack("<Q", len(text) if size is None else size) + text + body
    path.write_bytes(whole[: len(whole) - cut])
    return str(path)


def test_safetensors_are_read_to_the_bit(tmp_path):
    found = load.open_weights(safetensors(tmp_path / "w.safetensors"))
    assert list(found.arrays) == list(ARRAYS)
    for name, array in ARRAYS.items():
        read = np.asarray(found.arrays[name])
        assert read.dtype == array.dtype and found.arrays[name].shape == array.shape
        np.testing.assert_array_equal(read, array)


def test_bfloat16_is_the_upper_half_of_float32(tmp_path):
    halves = np.array([0x3F80, 0xC000, 0x3EAB], np.uint16)
    path = safetensors(tmp_path / "w.safetensors", {"a": halves})
    np.testing.assert_array_equal(np.asarray(load.open_weights(path).arrays["a"]), np.float32([1.0, -2.0, 0.333984375]))


def entry(**changes):
    return lambda header: header | {"a": header["a"] | changes}


@pytest.mark.parametrize(
    ("spoiled", "message"),
    [
        ({"cut": 1}, "cut short"),
        ({"cut": 10_000}, "cut short"),
        ({"size": 2**63}, "claims 9,223,372,036,854,775,808 bytes"),
        ({"size": 2**24 + 1}, "cut short"),
        ({"text": b"[" * 200_000 + b"]" * 200_000}, "is nested"),
        ({"text": b'{"a":' * 100_000 + b"1" + b"}" * 100_000}, "is nested"),
        ({"text": b"not json"}, "is not JSON"),
        ({"text": b"\xff\xfe{}"}, "is not JSON"),
        ({"text": b"[1]"}, "no JSON object"),
        ({"text": b"{}"}, "0 arrays"),
        ({"change": entry(dtype="F8_E4M3")}, "'a' has the type 'F8_E4M3'"),
        ({"change": entry(dtype=["F32"])}, "has the type"),
        ({"change": entry(shape=[2, -3])}, r"the shape \[2, -3\] of 'a' is impossible"),
        ({"change": entry(shape=[2**62, 2**62])}, "is impossible"),
        ({"change": entry(shape=[2, 4])}, "does not fit its place"),
        ({"change": entry(data_offsets=[-24, 0])}, "does not fit its place"),
        ({"change": entry(data_offsets=[0, 2**40])}, "does not fit its place"),
        ({"change": entry(data_offsets=[0])}, "offsets of 'a' are impossible"),
        ({"change": lambda header: header | {"a": 3}}, "is no array"),
        ({"change": lambda header: header | {"b": header["a"] | {"shape": [6]}}}, "gives two arrays the same bytes"),
    ],
)
def test_a_spoiled_safetensors_file_is_one_line(tmp_path, spoiled, message):
    with pytest.raises(UserError, match=message) as caught:
        load.open_weights(safetensors(tmp_path / "w.safetensors", **spoiled))
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["w.pth", "w.pt", "w.bin", "w.pkl", "w.ckpt"])
def test_pickled_weights_are_refused_unopened_with_the_way_out(tmp_path, name):
    with pytest.raises(UserError, match=r"is pickled, .* convert it .*safetensors") as caught:
        load.open_weights(str(tmp_path / name))  # which is not even there
    assert "\n" not in str(caught.value)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"is of no known kind; weights are a workdir, end in \.safetensors"):
        load.open_weights(str(tmp_path / "weights.txt"))
    with pytest.raises(UserError, match="is not there, or is no file"):
        load.open_weights(str(tmp_path / "w.safetensors"))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_is_read_to_the_bit(tmp_path, save):
    arrays = ARRAYS | {"fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3))}
    save(tmp_path / "w.npz", **arrays)
    found = load.open_weights(str(tmp_path / "w.npz")).arrays
    for name, array in arrays.items():
        np.testing.assert_array_equal(np.asarray(found[name]), array)


def npz_with(path, header, body=b"", claimed=None):
    text = header.encode("latin-1")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", claimed or len(text)) + text + body)
    return str(path)


@pytest.mark.parametrize(
    ("header", "body", "message"),
    [
        ("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }", b"x" * 8, "must be plain numbers"),
        ("{'descr': '<U9', 'fortran_order': False, 'shape': (1,), }", b"x" * 36, "must be plain numbers"),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (9,), }", b"x" * 4, "has not the length of its shape"),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999,), }", b"", "is impossible"),
        ("(" * 3000, b"", "an unknown header"),
        ("__import__('os').abort()", b"", "an unknown header"),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (25000000,), }", bytes(10**8), "claims 100,000,"),
    ],
)
def test_a_hostile_npz_is_one_line(tmp_path, header, body, message):
    with pytest.raises(UserError, match=message) as caught:
        load.open_weights(npz_with(tmp_path / "w.npz", header, body))
    assert "\n" not in str(caught.value)


def test_a_pickled_or_cut_npz_is_one_line(tmp_path):
    np.savez(tmp_path / "p.npz", a=np.array([{}], object))
    with pytest.raises(UserError, match="must be plain numbers"):
        load.open_weights(str(tmp_path / "p.npz"))
    np.savez(tmp_path / "w.npz", **ARRAYS)
    whole = (tmp_path / "w.npz").read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.npz").write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"no whole .npz file"):
            load.open_weights(str(tmp_path / "cut.npz"))


@pytest.mark.parametrize("name", ["w.weights.h5", "w.keras"])
def test_a_file_that_is_no_hdf5_is_one_line(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(range(256)) * 8)
    with pytest.raises(UserError, match="no whole HDF5 file") as caught:
        load.open_weights(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_links_out_of_an_hdf5_file_are_refused(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "w.weights.h5", "w") as file:
        file.create_group("layers/dense")["vars"] = h5py.ExternalLink("/etc/passwd", "/")
    with pytest.raises(UserError, match="is a link"):
        load.open_weights(str(tmp_path / "w.weights.h5"))


def named_as_in_augreg(weights, depth, heads):
    """timm's names and layouts of a ViT -> Google's, array by array."""
    dim = weights["cls_token"].shape[-1]
    found = {
        "cls": weights["cls_token"],
        "embedding/kernel": weights["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": weights["patch_embed.proj.bias"],
        "Transformer/posembed_input/pos_embedding": weights["pos_embed"],
        "Transformer/encoder_norm/scale": weights["norm.weight"],
        "Transformer/encoder_norm/bias": weights["norm.bias"],
        "head/kernel": weights["head.weight"].T,
        "head/bias": weights["head.bias"],
    }
    for i in range(depth):
        ours, theirs = f"Transformer/encoderblock_{i}", f"blocks.{i}"
        attention = f"{ours}/MultiHeadDotProductAttention_1"
        for part, rows in zip(("query", "key", "value"), np.split(np.arange(3 * dim), 3), strict=True):
            kernel = weights[f"{theirs}.attn.qkv.weight"][rows].T
            found[f"{attention}/{part}/kernel"] = kernel.reshape(dim, heads, -1)
            found[f"{attention}/{part}/bias"] = weights[f"{theirs}.attn.qkv.bias"][rows].reshape(heads, -1)
        found[f"{attention}/out/kernel"] = weights[f"{theirs}.attn.proj.weight"].T.reshape(heads, -1, dim)
        found[f"{attention}/out/bias"] = weights[f"{theirs}.attn.proj.bias"]
        for n, norm in ((0, "norm1"), (2, "norm2")):
            found[f"{ours}/LayerNorm_{n}/scale"] = weights[f"{theirs}.{norm}.weight"]
            found[f"{ours}/LayerNorm_{n}/bias"] = weights[f"{theirs}.{norm}.bias"]
        for n, layer in enumerate(("fc1", "fc2")):
            found[f"{ours}/MlpBlock_3/Dense_{n}/kernel"] = weights[f"{theirs}.mlp.{layer}.weight"].T
            found[f"{ours}/MlpBlock_3/Dense_{n}/bias"] = weights[f"{theirs}.mlp.{layer}.bias"]
    return found


def test_the_names_of_augreg_are_those_of_timm_in_another_layout():
    name, size, fields, *_ = test_from_torch.CASES["vit"]
    weights = test_from_torch.computed("vit")[1]
    shape = {"num_classes": test_from_torch.CLASSES, "image_shape": (*size, 3)}
    expected = from_torch(name, weights, **shape, **fields)
    renamed = named_as_in_augreg(weights, fields["depth"], fields["num_heads"])
    jax.tree.map(np.testing.assert_array_equal, from_npz(name, renamed, **shape, **fields), expected)
    with pytest.raises(UserError, match=r"have no 'cls'.*no 'head/bias'"):
        from_npz(name, {key: renamed[key] for key in renamed if key not in ("cls", "head/bias")}, **shape, **fields)


@pytest.mark.by_turns
@pytest.mark.parametrize("ending", ["weights.h5", "keras"])
def test_what_keras_saves_is_what_keras_has(tmp_path, ending):
    import keras

    keras.utils.clear_session()
    network = keras.applications.MobileNetV2(weights=None, input_shape=(32, 32, 3), alpha=0.35, classes=5)
    path = str(tmp_path / f"w.{ending}")
    network.save(path) if ending == "keras" else network.save_weights(path)
    given = load.convert("mobilenet_v2", load.open_weights(path), head=True, width_multiplier=0.35)
    assert (given.channels, given.num_classes) == (3, 5)
    images = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    model = models.create("mobilenet_v2", 5, width_multiplier=0.35)
    logits = model.apply(traverse_util.unflatten_dict(given.variables, sep="/"), images, train=False)
    np.testing.assert_allclose(jax.nn.softmax(logits), network.predict(images, verbose=0), rtol=0, atol=1e-5)
