"""Programs that are compiled for accelerators that are not there, and what is counted in them."""

import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from benchmarks import compiled, compilers, program_cost, slices
from vitcls import cli, models
from vitcls.core.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]
PROGRAM = (ROOT / "tests" / "programs" / "h100.hlo").read_text(encoding="utf-8")  # one kernel of each kind


def test_kernels_bytes_and_flops_by_hand():
    kernels = {kernel.kind: kernel for kernel in program_cost.kernels(PROGRAM)}
    found = {kind: (kernel.moved, kernel.flops, kernel.times) for kind, kernel in kernels.items() if kind != "product"}
    assert found == {
        "loop": (2 * 64 * 32 * 2, 0, 1),
        "convolution": (2 * (4 * 8 * 8 * 32 + 4 * 8 * 8 * 16 + 32 * 9 * 16), 2 * 4 * 8 * 8 * 32 * 9 * 16, 1),
        "attention": (2 * 2 * 200 * 6 * 64 * 2 + 4 * 2 * 6 * 200, 2 * 2 * 2 * 6 * 200 * 200 * 64, 1),
        "pallas": (64 * 32 * 2 + 4 * 32 * 4, 0, 1),  # whose arithmetic is not in the text
        "all-reduce": (2 * 64 * 32 * 2, 0, 1),
    }
    gemm, in_loop = (kernel for kernel in program_cost.kernels(PROGRAM) if kernel.kind == "product")
    assert (gemm.moved, gemm.flops) == (2 * (64 * 16 + 16 * 32 + 64 * 32), 2 * 64 * 32 * 16)  # without the workspace
    assert (in_loop.flops, in_loop.times) == (2 * 8 * 8 * 16, 5)
    assert program_cost.collectives(PROGRAM) == {"all-reduce": 1}


def exchange_on_8_devices(repeat):
    """The text of a program that reduces float32 [16, 4] over 8 devices, `repeat` times, and gathers once."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def exchange(x):  # float32 [16, 4] on each of 8 devices
        summed = jax.lax.fori_loop(0, repeat, lambda _, x: jnp.sin(jax.lax.psum(x, "data")), x)
        return summed, jax.lax.all_gather(x[:2], "data", tiled=True)

    spread, whole = PartitionSpec("data"), PartitionSpec()
    mapped = jax.shard_map(exchange, mesh=mesh, in_specs=spread, out_specs=(whole, whole), check_vma=False)
    return jax.jit(mapped).lower(jnp.zeros((128, 4))).compile().as_text()


@pytest.mark.parametrize("repeat", [1, 7])
def test_bytes_of_collectives_are_those_of_their_results_and_loops_count_by_their_trips(repeat):
    moved = program_cost.collective_bytes(exchange_on_8_devices(repeat))
    assert moved == {"all-reduce": repeat * 16 * 4 * 4, "all-gather": 16 * 4 * 4}


COLLECTIVES = """HloModule step

%scatter (a: f32[64,4]) -> f32[8,4] {
  %a = f32[64,4]{1,0} parameter(0)
  %sum = f32[64,4]{1,0} all-reduce(%a), to_apply=%add
  ROOT %part = f32[8,4]{1,0} dynamic-slice(%sum), dynamic_slice_sizes={8,4}
}

%send (x: f32[8]) -> f32[64] {
  %x = f32[8]{0} parameter(0)
  ROOT %gathered = f32[64]{0} all-gather(%x), dimensions={0}
}

ENTRY %main (x: f32[8], y: f32[64,4]) -> f32[] {
  %x = f32[8]{0} parameter(0)
  %y = f32[64,4]{1,0:T(8,128)S(1)} parameter(1)
  %a = (f32[4]{0}, f32[32]{0}) all-gather-start(%x), dimensions={0}
  %b = (bf16[10]{0:T(1024)(128)(2,1)}, f32[]{:T(128)}) all-reduce-start(%y, %y), to_apply=%add
  %c = (f32[8]{0}, f32[8]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x)
  %d = f32[8,4]{1,0} fusion(%y), kind=kCustom, calls=%scatter, metadata={op_name="reduce-scatter"}
  %e = ((f32[8]{0}), f32[64]{0}, u32[]) async-start(%x), calls=%send
  ROOT %f = f32[] constant(0)
}
"""


def test_bytes_of_collectives_that_run_asynchronously_or_are_fused():
    moved = {"all-gather": 128 + 256, "all-reduce": 24, "collective-permute": 32, "reduce-scatter": 8 * 4 * 4}
    assert program_cost.collective_bytes(COLLECTIVES) == moved


RING = """HloModule ring

%more (state: (f32[8], u32[])) -> pred[] {
  %limit = u32[] constant(7)
  %state = (f32[8]{0}, u32[]) parameter(0)
  %turn = u32[] get-tuple-element(%state), index=1
  ROOT %less = pred[] compare(%turn, %limit), direction=LT
}

%pass (state: (f32[8], u32[])) -> (f32[8], u32[]) {
  %two = u32[] constant(2)
  %state = (f32[8]{0}, u32[]) parameter(0)
  %part = f32[8]{0} get-tuple-element(%state), index=0
  %turn = u32[] get-tuple-element(%state), index=1
  %sent = f32[8]{0} collective-permute(%part), channel_id=1, source_target_pairs={{0,1},{1,0}}
  %next = u32[] add(%turn, %two)
  ROOT %new = (f32[8]{0}, u32[]) tuple(%sent, %next)
}

%begin (x: f32[8]) -> f32[16] {
  %x = f32[8]{0} parameter(0)
  ROOT %whole = f32[16]{0} all-gather(%x), channel_id=2, dimensions={0}
}

%end (x: f32[8]) -> f32[16] {
  %x = f32[8]{0} parameter(0)
  ROOT %again = f32[16]{0} all-gather(%x), channel_id=2, dimensions={0}
}

ENTRY %main (x: f32[8]) -> f32[16] {
  %x = f32[8]{0} parameter(0)
  %one = u32[] constant(1)
  %first = u32[] copy(%one)
  %state = (f32[8]{0}, u32[]) tuple(%x, %first)
  %loop = (f32[8]{0}, u32[]) while(%state), condition=%more, body=%pass
  %start = f32[16]{0} fusion(%x), kind=kCustom, calls=%begin
  ROOT %done = f32[16]{0} fusion(%x), kind=kCustom, calls=%end
}
"""


def test_bytes_of_a_ring_and_of_a_gather_that_two_parts_of_the_program_show():
    """From 1 below 7 in twos the loop runs three times, as libtpu writes the rings of fsdp."""
    assert program_cost.collective_bytes(RING) == {"all-gather": 64, "collective-permute": 3 * 32}
    assert program_cost.collectives(RING) == {"all-gather": 1, "collective-permute": 1}
    with pytest.raises(ValueError, match="how often does the loop loop run"):
        program_cost.collective_bytes(RING.replace("add(%turn, %two)", "add(%turn, %turn)"))


def test_bytes_that_a_chip_sends_are_those_of_a_ring():
    sent = {kind: program_cost.wire_bytes({kind: 800}, 8) for kind in program_cost.COLLECTIVES}
    assert sent["all-reduce"] == 2 * sent["all-gather"] == 1400
    assert (sent["reduce-scatter"], sent["collective-permute"], sent["all-to-all"]) == (5600, 800, 700)


def test_efficiency_on_a_slice_is_the_formula_of_its_page():
    assert [slices.links(device) for device in ("v5e:2x2", "v5e:2x4", "v5e:8x16", "v5e:16x16")] == [2, 2, 3, 4]
    row = {"model": "m", "strategy": "data", "device": "v5e:2x4", "batch": 64}
    row |= {"collective_bytes": {"all-reduce": 4e9 / 7}, "temporaries_gib": 1.0, "arguments_gib": 0.5}
    shown = slices.describe(row, 1.97e12 / 8, 0.5)
    assert (shown["images a chip"], shown["memory GiB"], shown["sent MB"]) == (8, 1.5, pytest.approx(1000))
    assert (shown["compute ms"], shown["links ms"]) == (pytest.approx(20), pytest.approx(10))
    assert (shown["efficiency %"], shown["overlapped %"]) == (pytest.approx(100 * 2 / 3), 100)


@pytest.mark.parametrize("argument", ["--device=v6e:2x4", "--device=v5e:2", "--model=resnet50", "--utilisation=0"])
def test_a_slice_that_cannot_be_counted_is_one_line(argument, capsys):
    assert cli.run(slices.main, [argument]) == 2
    assert argument in capsys.readouterr().err


def test_a_kernel_takes_what_its_bytes_or_its_products_take_and_its_launch():
    chip = program_cost.Chip(bandwidth=1e3, peak=1e6, launch=0.5)
    assert program_cost.Kernel("loop", 2_000, 0, 3, "").seconds(chip) == pytest.approx(3 * (2 + 0.5))
    assert program_cost.Kernel("product", 2_000, 4_000_000, 1, "").seconds(chip) == pytest.approx(4 + 0.5)


def test_kernels_are_told_apart_by_part_of_the_network_and_pass():
    parts = program_cost.by_part(program_cost.kernels(PROGRAM), program_cost.CHIPS["h100"])
    assert set(parts) == {
        "block/attention forward", "block/feed_forward backward", "stem forward", "step",
    }  # fmt: skip
    assert sum(parts.values()) == pytest.approx(
        sum(program_cost.by_kind(program_cost.kernels(PROGRAM), program_cost.CHIPS["h100"]).values())
    )


def test_flops_of_a_program_that_xla_has_compiled_here():
    product = jax.jit(lambda a, b: jnp.sin(a) @ b).lower(jnp.ones((64, 32)), jnp.ones((32, 16))).compile()
    assert sum(kernel.flops * kernel.times for kernel in program_cost.kernels(product.as_text())) == 2 * 64 * 32 * 16


@pytest.mark.parametrize(
    ("device", "words"),
    [("h100", "set H100_COMPILER to a directory"), ("v5e:2x2", "set TPU_COMPILER to the file libtpu/libtpu.so")],
)
def test_without_a_compiler_one_line_says_what_to_download(device, words, monkeypatch):
    monkeypatch.delenv("H100_COMPILER", raising=False)
    monkeypatch.delenv("TPU_COMPILER", raising=False)
    with pytest.raises(UserError, match=words) as caught:
        compilers.environment(device)
    assert "pip download --no-deps" in str(caught.value)
    monkeypatch.setenv("H100_COMPILER", "/nowhere")
    monkeypatch.setenv("TPU_COMPILER", "/nowhere")
    with pytest.raises(UserError, match=words):
        compilers.environment(device)


needs_h100 = pytest.mark.skipif("H100_COMPILER" not in os.environ, reason="H100_COMPILER is not set")
needs_tpu = pytest.mark.skipif("TPU_COMPILER" not in os.environ, reason="TPU_COMPILER is not set")


def run(*arguments):
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-m", "benchmarks.compiled", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.by_turns
def test_a_step_is_compiled_for_virtual_devices_of_a_cpu():
    environment = compilers.environment("cpu:4")
    assert (environment["JAX_NUM_CPU_DEVICES"], environment["JAX_PLATFORMS"]) == ("4", "cpu")
    done = run("--device=cpu:4", "--model=lenet5", "--batch=8", "--dtype=float32")
    assert done.returncode == 0, done.stderr
    assert "lenet5, batch 8, on cpu:4 (data, float32)" in done.stdout
    assert re.search(r"\d all-reduce \(0.2 MB\)", done.stdout)  # 61,706 parameters of four bytes
    done = run("--device=cpu:none", "--model=lenet5")
    assert done.returncode == 2 and done.stderr == (
        "error: there is no device 'cpu:none'; say how many virtual devices, such as 'cpu:16'\n"
    )


@needs_h100
def test_a_step_is_compiled_for_an_h100_once(tmp_path):
    arguments = ("--device=h100", "--model=lenet5", "--batch=64", f"--out={tmp_path}")
    first = run(*arguments)
    assert first.returncode == 0, first.stderr
    (row,) = json.loads((tmp_path / "compiled.json").read_text())
    contract = {"model", "batch", "device", "strategy", "tflop_per_chip", "gigabytes_per_chip", "temporaries_gib"}
    assert contract | {"collectives", "ceiling_images_per_second"} <= set(row)
    assert row["ceiling_images_per_second"] > 0 and row["collectives"] == {}
    changed = (tmp_path / "compiled.json").stat().st_mtime_ns
    assert run(*arguments).stdout == first.stdout
    assert (tmp_path / "compiled.json").stat().st_mtime_ns == changed


@needs_tpu
def test_a_slice_that_there_is_not_is_one_line(tmp_path):
    done = run("--device=v5e:3x3", "--model=lenet5", f"--out={tmp_path}")
    assert done.returncode == 1 and "there is no device 'v5e:3x3'" in done.stdout


@needs_h100
@pytest.mark.slow
def test_the_bytes_of_a_step_stay_within_the_budget():
    """3 % over what benchmarks/budgets.json has; a change that saves bytes writes its new numbers there."""
    budgets = json.loads((ROOT / "benchmarks" / "budgets.json").read_text(encoding="utf-8"))
    assert len(budgets) >= 5
    jobs = [
        compiled.Job(**{key: tuple(row[key]) if key == "overrides" else row[key] for key in compiled.job_fields()})
        for row in budgets
    ]
    for row, budget in zip(compiled.compile_jobs(jobs, ""), budgets, strict=True):
        assert row["gigabytes_per_chip"] <= 1.03 * budget["gigabytes_per_chip"], row["model"]


@needs_tpu
@pytest.mark.slow
def test_every_model_compiles_for_a_small_tpu_slice():
    """On v5e:2x2 at 1,024 images a step; COMPILED_OUT keeps what is done, so that the hour can be had in parts."""
    jobs = [compiled.Job("v5e:2x2", name, 1024, "data", "bfloat16", 0, ()) for name in models.names()]
    rows = compiled.compile_jobs(jobs, os.environ.get("COMPILED_OUT", ""))
    too_large = [row["model"] for row in rows if compiled.is_too_large(row)]
    assert not [row for row in rows if "error" in row and not compiled.is_too_large(row)]
    print("do not fit 16 GiB:", ", ".join(too_large) or "none")
