"""One device, `data`, `fsdp` and `pmap` over eight devices, and two processes, are the same computation."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from tests import bucket
from vitcls import config as configs
from vitcls import data
from vitcls.core import sharding
from vitcls.core.errors import UserError
from vitcls.models import layers
from vitcls.train import train_and_evaluate
from vitcls.training import build, checkpoint, places, run_dir, steps
from vitcls.training.evaluator import make_evaluator
from vitcls.training.metrics_log import read_history

pytestmark = pytest.mark.usefixtures("no_pictures")


class BatchNormNet(nn.Module):
    """A model whose result depends on the whole batch, through its statistics, and on its dropout."""

    num_classes: int
    norm: str

    @nn.compact
    def __call__(self, images, *, train):
        x = nn.Conv(8, (3, 3))(images)
        x = layers.normalize(x, self.norm, train=train)
        x = jax.nn.relu(x).mean((1, 2))
        x = layers.Dropout(0.2)(nn.Dense(256)(x), train=train)
        return nn.Dense(self.num_classes)(x)


def layouts():
    one = Mesh(np.asarray(jax.devices()[:1]), ("data",), axis_types=(AxisType.Auto,))
    return {
        "one device": sharding.Partition("data", one, 1),
        "data": sharding.all_devices("data"),
        "fsdp": sharding.all_devices("fsdp", min_shard_elements=64),
        "pmap": sharding.all_devices("pmap"),
    }


def train(config, partition, *, norm=""):
    """Trains six steps in two calls; returns, on the host, the state, the sums and the test evaluation."""
    config = configs.resolve(config)
    dataset = data.load(config.dataset)
    info = data.describe(dataset, config.dataset)
    plan = build.make_plan(config, info)
    training = build.make_training(config, info, plan, partition)
    if norm:
        training = with_model(config, info, plan, partition, norm)
    batches = data.train_batches(dataset, config.dataset, partition=partition, batch_size=config.batch_size, seed=0)
    state = partition.init(training.create_state, jax.random.key(0))
    sums = partition.replicate(jax.device_get(steps.zero_sums(training.task.means.values())))
    call = steps.make_train_call(training.train_step, batch_fn=batches.batch_fn, length=3)
    fixed = partition.replicate(np.int32(0)), partition.place(training.frozen)
    update = partition.compile_update(call, state, sums, batches.host_inputs(0, 3), *fixed)
    for step in (0, 3):
        state, sums = update(state, sums, batches.host_inputs(step, 3), *fixed)
    probabilities = np.empty((len(dataset.test.labels), info.num_classes), np.float32)
    evaluator = make_evaluator(config, training.model, info, dataset, partition)
    test = data.EvaluationBatches(dataset.test, image_shape=info.image_shape, partition=partition, batch_size=16)
    totals = evaluator(state.variables, test, probabilities), probabilities
    host_state = partition.to_host(state) if partition.mapped else jax.device_get(state)
    return host_state, partition.to_host(sums), totals


def with_model(config, info, plan, partition, norm):
    """The training functions of a config, of a model with batch statistics."""
    original = build.make_model
    try:
        build.make_model = lambda config, info, *rest, **options: BatchNormNet(info.num_classes, norm)
        return build.make_training(config, info, plan, partition)
    finally:
        build.make_model = original


def assert_close(actual, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), actual, expected)


@pytest.mark.by_turns
@pytest.mark.parametrize("norm", ["", "batch", "local_batch"], ids=["vit", "batch statistics", "local statistics"])
def test_all_strategies_give_the_same_state_metrics_and_predictions(tiny_config, norm):
    tiny_config.optimizer.name = "sgd"  # Adam divides by gradients, and so by their rounding errors
    tiny_config.optimizer.learning_rate = 0.1
    tiny_config.optimizer.clip_norm = 1.0
    tiny_config.optimizer.accumulate = 2 if not norm else 1
    tiny_config.batch_size = 32  # two pairs a device, one for each part
    tiny_config.loss.l2 = 1e-3
    tiny_config.model.dropout = 0.1
    results = {name: train(tiny_config, partition, norm=norm) for name, partition in layouts().items()}
    expected = results.pop("one device")
    if norm == "local_batch":  # eight devices have other statistics than one, and the same among themselves
        with pytest.raises(AssertionError):
            assert_close(results["data"][0].params, expected[0].params)
        expected = results.pop("data")
    start = jax.tree.leaves(train_start(tiny_config))
    assert (
        norm or max(np.abs(a - b).max() for a, b in zip(jax.tree.leaves(expected[0].params), start, strict=True)) > 1e-3
    )
    for name, actual in results.items():
        for part, what in zip(actual, ("state", "sums", "evaluation"), strict=True):
            try:
                assert_close(part, expected[("state", "sums", "evaluation").index(what)])
            except AssertionError as error:
                raise AssertionError(f"{name}: {what} differs") from error


@pytest.mark.by_turns
@pytest.mark.parametrize("task", ["distill", "simclr"])
def test_every_task_is_the_same_under_every_strategy(task, tiny_config, trained):
    tiny_config.task = {"name": task} | ({"teacher": str(trained)} if task == "distill" else {})
    tiny_config.optimizer.name = "sgd"
    tiny_config.optimizer.learning_rate = 0.1
    tiny_config.augment.mixup.probability = 0.0
    expected, *others = (
        train(tiny_config, partition) for name, partition in layouts().items() if name in ("one device", "fsdp", "pmap")
    )
    for actual in others:
        assert_close(actual, expected)


def train_start(config):
    config = configs.resolve(config)
    dataset = data.load(config.dataset)
    info = data.describe(dataset, config.dataset)
    training = build.make_training(config, info, build.make_plan(config, info), sharding.all_devices("data"))
    return jax.device_get(jax.jit(training.create_state)(jax.random.key(0)).params)


def test_fsdp_shards_parameters_and_optimizer_state():
    partition = sharding.all_devices("fsdp", min_shard_elements=64)
    shapes = {"kernel": jax.ShapeDtypeStruct((16, 24), jnp.float32), "bias": jax.ShapeDtypeStruct((24,), jnp.float32)}
    assert partition.bytes_per_device(shapes) == 16 * 24 * 4 // 8 + 24 * 4
    made = partition.init(
        lambda key: {"kernel": jax.random.normal(key, (16, 24)), "bias": jnp.zeros(24)}, jax.random.key(0)
    )
    assert made["kernel"].addressable_shards[0].data.shape == (16, 3)
    assert made["bias"].addressable_shards[0].data.shape == (24,)


def test_a_batch_that_cannot_be_divided_is_refused():
    with pytest.raises(UserError, match=r"config.batch_size=12 cannot be divided over 8 devices.*16"):
        sharding.all_devices("data").check_batch_size(12)


def test_rows_reach_the_devices_in_order():
    rows = {"x": np.arange(32).reshape(2, 16)}
    for name in ("data", "pmap"):
        partition = sharding.all_devices(name)
        put = partition.put_batch(rows, stacked=True)["x"]
        host = np.asarray(put)
        np.testing.assert_array_equal(np.moveaxis(host, 0, 1).reshape(2, 16) if name == "pmap" else host, rows["x"])


# Real slices, as `jax.make_mesh` orders them: the process of each device.
SLICES = {
    "v5e:4x4": (0, 0, 1, 1, 1, 1, 0, 2, 3, 3, 3, 3, 2, 2, 2, 0),
    "v5p:2x2x4": (0, 1, 2, 3) * 4,
    "v6e:4x8": (0, 0, 2, 2, 4, 4, 6, 6, 0, 0, 2, 2, 4, 4, 6, 6, 1, 1, 3, 3, 5, 5, 7, 7, 1, 1, 3, 3, 5, 5, 7, 7),
}


@pytest.mark.parametrize("owners", SLICES.values(), ids=SLICES)
def test_each_device_of_a_real_slice_gets_its_own_rows(owners):
    batch_size = 3 * len(owners)
    expected = np.repeat(owners, 3)  # device i of the mesh has rows 3 i .. 3 i + 2
    for process in set(owners):
        rows = sharding.rows_of_process(owners, process, batch_size)
        np.testing.assert_array_equal(rows, np.flatnonzero(expected == process))


@dataclasses.dataclass(frozen=True)
class FakeDevice:
    """What JAX's mesh asks of a device that is neither TPU nor GPU; CPUs have no slices to try."""

    id: int
    process_index: int
    slice_index: int | None = None
    platform: str = "cpu"
    device_kind: str = "cpu"


def test_slices_follow_each_other():
    devices = [FakeDevice(i, i // 2, slice_index=(1, 0, 1, 0)[i // 2]) for i in range(8)]
    assert [device.id for device in sharding.ordered(devices)] == [2, 3, 6, 7, 0, 1, 4, 5]
    assert list(sharding.ordered(jax.devices())) == jax.devices()


def test_rows_follow_a_mesh_in_any_order():
    devices = np.array(jax.devices())[[3, 0, 7, 1, 6, 2, 5, 4]]
    for strategy in ("data", "pmap"):
        partition = sharding.Partition(strategy, Mesh(devices, ("data",), axis_types=(AxisType.Auto,)))
        placed = partition.put_batch({"x": np.arange(16)})["x"]
        double = partition.compile_evaluation(lambda none, x: jax.lax.all_gather(2 * x, "data", tiled=True))
        if strategy == "data":
            double = partition.compile_evaluation(lambda none, x: 2 * x)
        np.testing.assert_array_equal(
            partition.to_host(double(partition.replicate(np.zeros(())), placed)), 2 * np.arange(16)
        )


TWO_PROCESSES = """
import json, sys
import jax
jax.config.update("jax_num_cpu_devices", 2)
from vitcls import cli
from vitcls.core import sharding
from tests import bucket
from vitcls import config as configs
from vitcls.train import train_and_evaluate

def command(arguments):
    cli.start_jax()
    plain = sharding.ordered
    for question in json.load(open(arguments[0])):
        order = question["order"] or range(4)
        sharding.ordered = lambda devices: plain(devices)[list(order)]
        values = json.dumps(question["config"]).replace("PROCESS", str(jax.process_index()))
        try:
            train_and_evaluate(configs.from_json(values), question["workdir"])
            answer = "done"
        except (cli.UserError, cli.RunError) as error:
            answer = f"{type(error).__name__}: {error}"
        with open(f"{arguments[0]}.{jax.process_index()}", "a", errors="backslashreplace") as file:
            print(answer, file=file)

sys.exit(cli.run(command))
"""
INTERLEAVED = (0, 2, 1, 3)


def question(config, workdir, order=INTERLEAVED, **values):
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict(values)
    return {"config": configs.resolve(config).to_dict(), "workdir": str(workdir), "order": order}


def start_two_processes(questions, path):
    """Starts two processes of two devices as Slurm does, through its variables alone; they answer every question."""
    path.write_text(json.dumps(questions))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    slurm = {"JOB_ID": "7", "STEP_NODELIST": "localhost", "NTASKS": "2", "STEP_NUM_NODES": "2", "LOCALID": "0"}
    environment = os.environ | {f"SLURM_{name}": value for name, value in slurm.items()}
    return [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, str(path)],
            env=environment | {"SLURM_PROCID": str(i), "JAX_COORDINATOR_PORT": str(port)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]


@pytest.mark.by_turns
def test_two_processes_of_two_devices_make_the_run_of_one_process(tiny_config, tmp_path, monkeypatch):
    """Whatever the order of the devices. An error of one process is that of all at once, and so is a SIGTERM."""
    tiny_config.optimizer.name = "sgd"
    tiny_config.optimizer.learning_rate = 0.1
    tiny_config.partition.min_shard_elements = 64
    tiny_config.augment.mixup.probability = tiny_config.model.drop_path = 0.0  # compiled as often as anything else
    alone = tmp_path / "alone"
    train_and_evaluate(tiny_config, alone)
    np.savez(tmp_path / "\udce90.npz", x_train=np.zeros((99, 8, 8, 3), np.uint8), y_train=np.arange(99) % 3)

    runs = [("data", "streaming"), ("fsdp", "resident"), ("pmap", "streaming")]
    questions = [
        question(
            tiny_config,
            tmp_path / strategy,
            **{"partition.strategy": strategy, "dataset.pipeline": pipeline},
        )
        for strategy, pipeline in runs
    ]
    server, url = bucket.start_server()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", url)  # the second process sees no file of the first there
    in_bucket = {"partition.strategy": "fsdp", "report.checkpoint": "best"}
    questions += 2 * [question(tiny_config, "gs://runs/two", **in_bucket)]  # made, and read back by both
    questions.append(question(tiny_config, tmp_path / "data", seed=1))
    questions.append(question(tiny_config, tmp_path / "two", total="1PROCESS steps"))
    only_on_one = {"dataset.name": "npz", "dataset.data_dir": str(tmp_path / "\udce9PROCESS.npz")}
    questions.append(question(tiny_config, tmp_path / "npz", **only_on_one))
    endless = {"total": "100000 steps", "eval_every": "50000 steps", "checkpoint_every": "50000 steps"}
    stopped = tmp_path / "stopped"
    questions.append(question(tiny_config, stopped, **endless))
    processes = start_two_processes(questions, tmp_path / "questions.json")
    deadline = time.monotonic() + 240
    while not read_history(stopped):
        assert time.monotonic() < deadline and processes[1].poll() is None, processes[1].communicate()[1]
        time.sleep(0.1)
    processes[1].send_signal(signal.SIGTERM)
    for i, process in enumerate(processes):
        out, err = process.communicate(timeout=240)
        assert process.returncode == 128 + signal.SIGTERM, err
        assert "[Gloo]" not in out
        assert "of 2 (Slurm)" in err
        *done, other_config, two_configs, no_file = (tmp_path / f"questions.json.{i}").read_text().splitlines()
        assert done == ["done"] * (len(runs) + 2)
        assert other_config.startswith(f"UserError: {tmp_path / 'data'} holds a run with another config.json")
        assert two_configs == (
            "UserError: config.total is '10 steps' on process 0 and '11 steps' on process 1; give all the same"
        )
        missing = f"{tmp_path}/\\udce91.npz"  # its name is not UTF-8
        assert no_file.startswith(f"UserError: config.dataset.data_dir='{missing}' is not a file; give the .npz file")
    assert checkpoint.latest_whole(stopped / "checkpoints", quarantine=False) is not None

    one = run_dir.open_workdir(alone)
    model = build.make_model(one.config, one.info)
    ours = json.loads((alone / "report" / "metrics.json").read_text())
    in_bucket = places.copied("gs://runs/two")
    server.communicate()
    for path in (*(tmp_path / strategy for strategy, _ in runs), in_bucket):
        two = run_dir.open_workdir(path)
        assert_close(two.restore_variables(model, 12), one.restore_variables(model, 12))
        theirs = json.loads((path / "report" / "metrics.json").read_text())
        if path == in_bucket:
            assert theirs["checkpoint_step"] == checkpoint.best(path / "checkpoints", "eval/accuracy")
            continue
        for name in ("loss", "accuracy", "recall_macro", "auc_ovr_macro", "ece"):
            assert theirs[name] == pytest.approx(ours[name], rel=1e-4), (path, name)
