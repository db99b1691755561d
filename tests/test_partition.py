"""One device, `data`, `fsdp` and `pmap` over eight devices, and two processes, are the same computation."""

import json
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

from vitcls import checkpoint, data, experiment, partition, steps, workdir
from vitcls import config as configs
from vitcls.errors import UserError
from vitcls.models.layers import Dropout
from vitcls.train import train_and_evaluate
from vitcls.writers import read_history


class BatchNormNet(nn.Module):
    """A model whose result depends on the whole batch, through its statistics, and on its dropout."""

    num_classes: int
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images, *, train):
        x = nn.Conv(8, (3, 3))(images)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, axis_name=self.axis_name)(x)
        x = jax.nn.relu(x).mean((1, 2))
        x = Dropout(0.2, axis_name=self.axis_name)(nn.Dense(256)(x), train=train)
        return nn.Dense(self.num_classes)(x)


def layouts():
    one = Mesh(np.asarray(jax.devices()[:1]), ("data",), axis_types=(AxisType.Auto,))
    return {
        "one device": partition.Partition("data", one, 1),
        "data": partition.all_devices("data"),
        "fsdp": partition.all_devices("fsdp", min_shard_elements=64),
        "pmap": partition.all_devices("pmap"),
    }


def train(config, layout, *, batch_norm=False):
    """Trains six steps in two calls; returns, on the host, the state, the sums and the test evaluation."""
    config = configs.resolve(config)
    dataset = data.load(config.dataset)
    info = data.describe(dataset, config.dataset)
    plan = experiment.make_plan(config, info)
    training = experiment.make_training(config, info, plan, layout)
    if batch_norm:
        training = with_model(config, info, plan, layout)
    batches = data.train_batches(dataset, config.dataset, partition=layout, batch_size=config.batch_size, seed=0)
    state = layout.init(training.create_state, jax.random.key(0))
    sums = layout.replicate(jax.device_get(steps.zero_sums()))
    call = steps.make_train_call(training.train_step, open_batches=batches.open, seed=0, length=3)
    update = layout.compile_update(call, state, sums, batches.data(0, 3))
    for step in (0, 3):
        state, sums = update(state, sums, batches.data(step, 3))
    evaluate = layout.compile_evaluation(experiment.make_eval_step(config, training.model, info))
    test = data.EvaluationBatches(dataset.test, image_shape=info.image_shape, partition=layout, batch_size=16)
    totals = [layout.to_host(evaluate(state.variables, batch)) for batch in test]
    host_state = layout.to_host(state) if layout.mapped else jax.device_get(state)
    return host_state, layout.to_host(sums), totals


def with_model(config, info, plan, layout):
    """The training functions of a config, of a model with batch statistics."""
    original = experiment.make_model
    try:
        experiment.make_model = lambda config, info, *, axis_name=None: BatchNormNet(info.num_classes, axis_name)
        return experiment.make_training(config, info, plan, layout)
    finally:
        experiment.make_model = original


def assert_close(actual, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), actual, expected)


@pytest.mark.parametrize("batch_norm", [False, True], ids=["vit", "batch statistics"])
def test_all_strategies_give_the_same_state_metrics_and_predictions(tiny_config, batch_norm):
    tiny_config.optimizer.name = "sgd"  # Adam divides by gradients, and so by their rounding errors
    tiny_config.optimizer.learning_rate = 0.1
    tiny_config.optimizer.clip_norm = 1.0
    tiny_config.optimizer.accumulate = 2 if not batch_norm else 1
    tiny_config.loss.l2 = 1e-3
    tiny_config.model.dropout = 0.1
    results = {name: train(tiny_config, layout, batch_norm=batch_norm) for name, layout in layouts().items()}
    expected = results.pop("one device")
    start = jax.tree.leaves(train_start(tiny_config))
    assert (
        batch_norm
        or max(np.abs(a - b).max() for a, b in zip(jax.tree.leaves(expected[0].params), start, strict=True)) > 1e-3
    )
    for name, actual in results.items():
        for part, what in zip(actual, ("state", "sums", "evaluation"), strict=True):
            try:
                assert_close(part, expected[("state", "sums", "evaluation").index(what)])
            except AssertionError as error:
                raise AssertionError(f"{name}: {what} differs") from error


def train_start(config):
    config = configs.resolve(config)
    dataset = data.load(config.dataset)
    info = data.describe(dataset, config.dataset)
    training = experiment.make_training(config, info, experiment.make_plan(config, info), partition.all_devices("data"))
    return jax.device_get(jax.jit(training.create_state)(jax.random.key(0)).params)


def test_fsdp_shards_parameters_and_optimizer_state():
    layout = partition.all_devices("fsdp", min_shard_elements=64)
    shapes = {"kernel": jax.ShapeDtypeStruct((16, 24), jnp.float32), "bias": jax.ShapeDtypeStruct((24,), jnp.float32)}
    assert layout.bytes_per_device(shapes) == 16 * 24 * 4 // 8 + 24 * 4
    made = layout.init(
        lambda key: {"kernel": jax.random.normal(key, (16, 24)), "bias": jnp.zeros(24)}, jax.random.key(0)
    )
    assert made["kernel"].addressable_shards[0].data.shape == (16, 3)
    assert made["bias"].addressable_shards[0].data.shape == (24,)


def test_a_batch_that_cannot_be_divided_is_refused():
    with pytest.raises(UserError, match=r"config.batch_size=12 cannot be divided over 8 devices.*16"):
        partition.all_devices("data").check_batch_size(12)


def test_rows_reach_the_devices_in_order():
    rows = {"x": np.arange(32).reshape(2, 16)}
    for name in ("data", "pmap"):
        layout = partition.all_devices(name)
        put = layout.put_batch(rows, stacked=True)["x"]
        host = np.asarray(put)
        np.testing.assert_array_equal(np.moveaxis(host, 0, 1).reshape(2, 16) if name == "pmap" else host, rows["x"])


TWO_PROCESSES = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 2)
from vitcls import cli
from vitcls import config as configs
from vitcls.train import train_and_evaluate

def command(arguments):
    port, process, strategy, pipeline, workdir = arguments
    cli.start_jax(f"localhost:{port}", 2, int(process))
    config = configs.from_json(open(workdir + ".json").read()).unlock()
    config.partition.strategy, config.dataset.pipeline = strategy, pipeline
    config.partition.min_shard_elements = 64
    train_and_evaluate(config.lock(), workdir)

sys.exit(cli.run(command))
"""


def start_two_processes(config, path, strategy, pipeline):
    path.with_suffix(".json").write_text(configs.to_json(configs.resolve(config)))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", TWO_PROCESSES, str(port)]
    return [
        subprocess.Popen([*command, str(i), strategy, pipeline, str(path)], stderr=subprocess.PIPE, text=True)
        for i in range(2)
    ]


@pytest.mark.parametrize(("strategy", "pipeline"), [("data", "streaming"), ("fsdp", "resident"), ("pmap", "streaming")])
def test_two_processes_of_two_devices_make_the_run_of_one_process(tiny_config, tmp_path, strategy, pipeline):
    tiny_config.optimizer.name = "sgd"
    tiny_config.optimizer.learning_rate = 0.1
    alone = tmp_path / "alone"
    train_and_evaluate(tiny_config, alone)

    together = tmp_path / "together"
    for process in start_two_processes(tiny_config, together, strategy, pipeline):
        _, err = process.communicate(timeout=240)
        assert process.returncode == 0, err
    one, two = (workdir.open_workdir(path) for path in (alone, together))
    model = experiment.make_model(one.config, one.info)
    assert_close(two.restore_variables(model, 12), one.restore_variables(model, 12))
    ours, theirs = (json.loads((path / "report" / "metrics.json").read_text()) for path in (alone, together))
    assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-4)
    assert theirs["accuracy"] == ours["accuracy"]


def test_sigterm_to_one_process_stops_all_of_them_after_saving(tiny_config, tmp_path):
    tiny_config.total = "100000 steps"
    tiny_config.eval_every = tiny_config.checkpoint_every = "50000 steps"
    path = tmp_path / "run"
    processes = start_two_processes(tiny_config, path, "data", "resident")
    deadline = time.monotonic() + 120
    while not read_history(path):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    processes[1].send_signal(signal.SIGTERM)
    for process in processes:
        _, err = process.communicate(timeout=60)
        assert process.returncode == 128 + signal.SIGTERM, err
    assert checkpoint.latest_whole(path / "checkpoints", set_aside=False) is not None
