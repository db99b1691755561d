"""Compilers for accelerators that are not there: XLA's for an NVIDIA H100, described by a file, and libtpu's.

The CPU's, for any number of virtual devices ('cpu:16'), is there always. The others are never dependencies; the
environment says where they were unpacked:

    H100_COMPILER   a directory with the contents of the wheels jax-cuda12-pjrt (of jax's version) and
                    nvidia-cuda-nvcc-cu12
    TPU_COMPILER    libtpu.so, out of the wheel libtpu

A process compiles for one kind of device, which must be chosen before JAX starts: `environment`, then `devices`.
"""

import contextlib
import importlib.metadata
import os
import pathlib

from vitcls.core.errors import UserError

_CHIPS = pathlib.Path(__file__).with_name("chips")
_PLUGIN = "jax_plugins/xla_cuda12/xla_cuda_plugin.so"


def environment(device: str) -> dict[str, str]:
    """The variables that a process needs to compile for `device`: 'h100', a TPU slice such as 'v5e:2x2', or 'cpu:16'.

    Raises UserError where the compiler is not there, with what to download.
    """
    common = {"JAX_PLATFORMS": "cpu"}
    kind, _, count = device.partition(":")
    if kind == "cpu":
        if not count.isdigit() or not int(count):
            raise UserError(f"there is no device '{device}'; say how many virtual devices, such as 'cpu:16'")
        return common | {"JAX_NUM_CPU_DEVICES": count}
    if device == "h100":
        site = pathlib.Path(os.environ.get("H100_COMPILER", ""))
        if "H100_COMPILER" not in os.environ or not (site / _PLUGIN).exists():
            jax_version = importlib.metadata.version("jax")
            raise UserError(
                "set H100_COMPILER to a directory into which these wheels are unzipped: pip download --no-deps "
                f"jax-cuda12-pjrt=={jax_version} nvidia-cuda-nvcc-cu12==12.9.86"
            )
        flags = (
            f"--xla_gpu_cuda_data_dir={site / 'nvidia/cuda_nvcc'}",
            "--xla_gpu_autotune_level=0",
            "--xla_gpu_enable_triton_gemm=false",
        )
        return common | {"XLA_FLAGS": " ".join([os.environ.get("XLA_FLAGS", ""), *flags]).strip()}
    library = os.environ.get("TPU_COMPILER", "")
    if not os.path.isfile(library):
        raise UserError(
            "set TPU_COMPILER to the file libtpu/libtpu.so out of the wheel of: pip download --no-deps libtpu"
        )
    return common | {"TPU_LIBRARY_PATH": library, "TPU_SKIP_MDS_QUERY": "1"}


def devices(device: str) -> list:
    """The devices of an H100, a slice or a CPU, for which this process, started in `environment`, can compile.

    Raises UserError for a slice that there is not.
    """
    import jax
    from jax.experimental import topologies

    if device == "h100":
        return _h100()
    if device.startswith("cpu:"):
        return jax.devices()
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=device).devices
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0].removeprefix("INVALID_ARGUMENT: ")
        raise UserError(f"there is no device '{device}'; use 'h100' or a slice such as 'v5e:2x2': {reason}") from None
    return list(found)


def _h100() -> list:
    from jax.experimental import topologies
    from jaxlib import xla_client

    plugin = pathlib.Path(os.environ["H100_COMPILER"]) / _PLUGIN
    client = xla_client.load_pjrt_plugin_dynamically("cuda", str(plugin))
    with contextlib.suppress(Exception):  # there is no driver, which the compiler can do without
        xla_client.initialize_pjrt_plugin("cuda")
    chip = (_CHIPS / "h100.txtpb").read_text(encoding="utf-8")
    topology = xla_client.make_c_api_device_topology(client, "H100", target_config=chip, topology="1x1x1")
    _allow_fused_attention()
    return list(topologies.TopologyDescription(topology._make_compile_only_devices()).devices)


def _allow_fused_attention() -> None:
    """JAX asks the driver which fused attention there is; an H100 with cuDNN 9.10 has all of it."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    fused.check_compute_capability = lambda capability: True
    fused.check_cudnn_version = lambda: 91000
    fused.is_cuda_compute_capability_equal = lambda capability: False
