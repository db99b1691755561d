"""The table of models: `python -m vitcls.models` and docs/models.md."""

import functools
import pathlib
import re
import subprocess
import sys

import pytest

from vitcls import models
from vitcls.core.errors import UserError
from vitcls.models import __main__ as table

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "models.md"

describe = functools.cache(table.describe)  # of the presets as they are

SMALLEST_OF_EACH_FAMILY = (
    *("alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "googlenet", "improved_resnext50_lite"),
    *("improved_vit_tiny", "inception_v3", "lenet5", "mobilenet_v1", "mobilenet_v2", "mobilenet_v3_small"),
    *("paper_cnn", "resnet18", "resnetv2_50x1_bit", "resnext29_8x64d", "vgg11_bn", "vit_tiny_patch16"),
)


def rows_of(page):
    """name -> its line, in order."""
    return {line.split("`")[1]: line for line in page.splitlines() if line.startswith("| `")}


def test_the_page_has_every_model_in_order():
    assert list(rows_of(PAGE.read_text())) == models.names()


@pytest.mark.by_turns
@pytest.mark.parametrize("name", SMALLEST_OF_EACH_FAMILY)
def test_the_page_says_what_the_command_says_now(name):
    assert rows_of(PAGE.read_text())[name] == rows_of(table.markdown_page([describe(name)]))[name]


@pytest.mark.slow
def test_the_page_is_what_the_command_writes():
    assert PAGE.read_text() == table.markdown_page([table.describe(name) for name in models.names()])


@pytest.mark.by_turns
def test_flops_are_those_the_papers_count():
    # Multiply-adds at the native size, of He et al. 2016 (table 1), Xie et al. 2017 (table 1), Howard et al. 2017
    # (table 4) and Tan & Le 2019 (table 2); ours are 2 FLOPs each and a few for norms and activations.
    for name, multiply_adds in (
        ("resnet18", 1.8e9),
        ("resnext50_32x4d", 4.2e9),
        ("mobilenet_v1", 569e6),
        ("efficientnet_b0", 0.39e9),
    ):
        assert describe(name).flops == pytest.approx(2 * multiply_adds, rel=0.06)


def test_activations_of_a_small_network_are_what_its_backward_pass_reads():
    # Of one float32 image: the padded input of each convolution, its output before the activation (whose derivative
    # needs it) and what pooling and dense layers read. Bounds, since which of two equal arrays is kept may change.
    saved = describe("lenet5").activation_bytes
    outputs = 28 * 28 * 6 + 10 * 10 * 16 + 120 + 84
    assert 4 * outputs <= saved <= 4 * 5 * outputs


def test_remat_saves_fewer_activations(monkeypatch):
    plain = describe("resnet18").activation_bytes
    preset = models.preset("resnet18")
    monkeypatch.setitem(models.MODELS._entries, "resnet18", preset._replace(fields=preset.fields | {"remat": "block"}))
    assert table.describe("resnet18").activation_bytes < 0.6 * plain


@pytest.mark.by_turns
def test_fields_of_a_model_change_its_line():
    """The depthwise convolution of one block: 9 weights and a bias for each hidden channel."""
    whole = describe("improved_vit_tiny")
    fields = table.fields_of("improved_vit_tiny", [("model.local_conv_blocks", "first_half")])
    assert fields == {"local_conv_blocks": "first_half"}
    first_half = table.describe("improved_vit_tiny", fields)
    assert whole.parameters - first_half.parameters == 6 * 10 * 768
    assert whole.flops - first_half.flops > 6 * 64 * 768 * 2 * 9
    with pytest.raises(UserError, match=r"config\.batch_size changes no model of the table"):
        table.fields_of("improved_vit_tiny", [("batch_size", "3")])


@pytest.mark.by_turns
def test_the_command_prints_one_line_for_each_model_and_one_for_a_wrong_name():
    def run(*arguments):
        return subprocess.run([sys.executable, "-m", "vitcls.models", *arguments], capture_output=True, text=True)

    shown = run("lenet5", "mnist_cnn")
    assert shown.returncode == 0
    header, lenet, cnn = shown.stdout.splitlines()
    assert header.split()[:2] == ["model", "parameters"]
    assert lenet.split()[:2] == ["lenet5", "61,706"]
    assert cnn.split()[:2] == ["mnist_cnn", "421,642"]
    assert "| conv_2/conv/kernel | (5, 5, 6, 16)" in run("lenet5", "--parameters").stdout
    narrow = ("vit_tiny_patch4", "--config.model.mlp_dim=8", "--parameters")
    assert re.search(r"block_0/feed_forward/expand/kernel +\| \(192, 8\)", run(*narrow).stdout)
    wrong = run("lenet6")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert len(wrong.stderr.splitlines()) == 1
    assert "config.model.name 'lenet6' is not known; did you mean 'lenet5'" in wrong.stderr
