"""Every test runs on eight virtual CPU devices, with rank promotion and warnings as errors, and leaves no trace.

With VITCLS_TEST_PLATFORM=default it runs on what JAX finds (benchmarks/lease.py), its products in full precision.
"""

import gc
import os
import signal
import sys
import tempfile

# The commands that tests start import the same modules over and over: they are to be compiled once.
os.environ["PYTHONDONTWRITEBYTECODE"] = ""

if os.environ.get("VITCLS_TEST_PLATFORM") != "default":
    os.environ["JAX_PLATFORMS"] = "cpu"
    # The compiler takes most of the time of tests that compile much and run little: without LLVM's optimisation, and
    # with the older emitters of fusions, it is done in half of it.
    os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Beside another worker, threads of one product of small matrices only wait for each other.
os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"
# The cache of a run holds every program, however small: its workers and the commands they start compile the same ones.
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"  # nobody reads which line each operation comes from

import jax
import pytest

if os.environ.get("VITCLS_TEST_PLATFORM") != "default":
    jax.config.update("jax_num_cpu_devices", 8)
else:
    jax.config.update("jax_default_matmul_precision", "highest")  # accelerators have less by default
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_configure(config):
    """Keeps compiled programs and indexes of this run in one directory of its own, not in the user's."""
    sys.dont_write_bytecode = False
    gc.set_threshold(50_000, 20, 20)  # as commands do (vitcls/cli.py)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job would hand on that it is ignored
    if not hasattr(config, "workerinput"):  # xdist's workers inherit the environment
        directory = tempfile.TemporaryDirectory(prefix="vitcls-")
        config.add_cleanup(directory.cleanup)
        os.environ["VITCLS_CACHE_DIR"] = directory.name
    jax.config.update("jax_compilation_cache_dir", os.path.join(os.environ["VITCLS_CACHE_DIR"], "xla"))


def pytest_runtest_setup(item):
    if item.get_closest_marker("eight_devices") and jax.device_count() != 8:
        pytest.skip("needs eight devices")


@pytest.fixture(autouse=True, scope="module")
def what_a_file_leaves(request):
    """Is let go of: the programs of all files together would take more memory than there is."""
    gc.freeze()  # what was there before is never searched for garbage again, which takes a second each time
    yield
    for value in vars(request.module).values():
        if hasattr(value, "cache_clear"):
            value.cache_clear()
    jax.clear_caches()
    gc.collect()


# The files that take longest, which start first, so that no worker is left alone with one of them.
LONGEST = ("test_rehearse", "test_train", "test_sharding", "test_every_model", "test_tasks", "test_docs")
LONGEST += ("test_benchmarks", "test_old_workdirs", "test_table", "test_prepare")


TURNS = 4  # of the tests that are marked by_turns


def pytest_addoption(parser):
    words = f"one in {TURNS} of the tests that go by turns, by this number, as that of commits; default: all of them"
    parser.addoption("--turn", type=int, metavar="N", help=words)


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))
    turn = config.getoption("--turn")
    if turn is not None:
        groups = dict.fromkeys(filter(None, map(_goes_with, items)))  # in their order, each once
        waiting = {group for i, group in enumerate(groups) if (i - turn) % TURNS}
        config.hook.pytest_deselected(items=[item for item in items if _goes_with(item) in waiting])
        items[:] = [item for item in items if _goes_with(item) not in waiting]


def _goes_with(item):
    """What has its turn together: a test with all its parameters, or those that share a fixture; None for the quick."""
    marker = item.get_closest_marker("by_turns")
    return marker and (item.path, *(marker.args or [item.originalname]))


def make_tiny_config():
    """A config that trains in a second: 96 synthetic 8x8 images, an improved ViT with one block of width 16."""
    from vitcls.config import default_config

    config = default_config("improved_vit_tiny")
    config.batch_size = 16
    config.total = "12 steps"
    config.log_every = "4 steps"
    config.eval_every = "6 steps"
    config.checkpoint_every = "4 steps"
    config.steps_per_call = 2
    config.dataset.update(name="synthetic", num_examples=120, num_classes=3, image_size=8)
    config.model.update(stem="patch", patch_size=2, hidden_dim=16, depth=1, num_heads=2, mlp_dim=16, drop_path=0.1)
    config.augment.crop.probability = 1.0
    config.augment.mixup.probability = 0.5
    config.optimizer.ema_decay = 0.99
    config.report.timing = False
    return config


@pytest.fixture
def tiny_config():
    return make_tiny_config()


@pytest.fixture
def no_pictures(monkeypatch):
    """For runs whose report nobody looks at: its pictures take two seconds."""
    from vitcls.report import plots

    monkeypatch.setattr(plots, "styled", lambda draw: None)  # as where nothing was logged


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A workdir that was trained once for all tests that only read it, or write its report again."""
    from vitcls.train import train_and_evaluate

    path = tmp_path_factory.mktemp("trained") / "run"
    train_and_evaluate(make_tiny_config(), path)
    return path


@pytest.fixture(scope="session")
def postgres():
    """A running PostgreSQL, or the tests that ask for it are skipped."""
    from tests.postgres import server

    with server() as running:
        yield running
