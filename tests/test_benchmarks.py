"""The benchmarks count right, and refuse what would mislead."""

import csv
import dataclasses
import importlib
import itertools
import json
import os
import re
import subprocess
import sys
import tarfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from benchmarks import (
    agreement,
    cpu_devices,
    harness,
    intervals,
    lease,
    program_cost,
    scaling,
    search_orders,
    startup,
    throughput,
    versus,
    workload,
)
from benchmarks.peers import vit_fields
from vitcls import ledger, models
from vitcls.core import sharding
from vitcls.core.errors import UserError
from vitcls.models import summary


def test_numbers_of_two_runs_are_not_compared():
    ours, other = harness.Timing((2.0, 2.0)), harness.Timing((1.0, 1.0), run="another")
    assert harness.ratio(ours, harness.Timing((1.0, 4.0))) == 1.25
    with pytest.raises(ValueError, match="another"):
        harness.ratio(ours, other)


def test_calls_that_are_compared_take_turns_after_compilation_and_warm_up():
    turns = []
    timings = harness.alternate({name: lambda name=name: turns.append(name) for name in "ab"}, repeats=3)
    assert "".join(turns) == "ab" * 5
    assert [len(timings[name].seconds) for name in "ab"] == [3, 3]


def test_what_comes_before_a_turn_is_not_timed():
    turns = []
    calls = {name: lambda name=name: turns.append(name) for name in "ab"}
    harness.alternate(calls, repeats=1, warm=True, before={"b": lambda: turns.append("before b")})
    assert turns == ["a", "before b", "b"]
    slow = harness.alternate({"": lambda: None}, repeats=1, warm=True, before={"": lambda: time.sleep(0.2)})
    assert slow[""].median < 0.1


def test_a_repeated_function_runs_as_often_as_it_should():
    x, made = np.arange(6.0, dtype=np.float32).reshape(2, 3), []

    def function(x, parameters):
        jax.debug.callback(lambda: made.append(None))
        return {"product": x @ parameters["kernel"]}

    run = harness.repeated(function, 7)
    result = jax.block_until_ready(run(x, {"kernel": x.T}))
    jax.effects_barrier()
    assert len(made) == 7
    np.testing.assert_array_equal(result["product"], x @ x.T)


def test_a_repeated_function_stays_in_its_loop_though_it_gives_the_same_every_time():
    compiled = harness.repeated(lambda x: x @ x.T, 50).lower(jnp.ones((2, 3))).compile().as_text()
    computations = {text.split(" ", 1)[0]: text for text in re.split(r"\n(?=%|ENTRY )", compiled)}
    body = computations[re.search(r"body=(%[\w.]+)", compiled)[1]]
    called = [computations[name] for name in re.findall(r"calls=(%[\w.]+)", body)]
    assert any(" dot(" in text for text in [body, *called])


def test_the_recorded_command_can_be_given_again(monkeypatch, tmp_path):
    for out in (["--out", str(tmp_path)], [f"--out={tmp_path}"]):
        monkeypatch.setattr(sys, "argv", ["/a/b/versus.py", "--data_dir=my data", *out, "--batch=8"])
        harness.publish("table", [{"a": 1}], str(tmp_path))
        about = json.loads((tmp_path / "table.json").read_text())["about"]
        assert about["command"] == "python -m benchmarks.versus '--data_dir=my data' --batch=8"


def test_the_row_of_a_child_that_fails_says_why():
    failing = "jax.jit(lambda x: x + jax.numpy.ones(3))(jax.numpy.ones(2))"
    row = harness.in_child("timeit", ["-n1", "-r1", "-s", "import jax", failing])
    assert row["error"].startswith("TypeError: add got incompatible shapes")


def test_a_timed_call_is_waited_for():
    slow = jax.jit(lambda x: jax.lax.fori_loop(0, 300, lambda _, x: jnp.tanh(x @ x), x))
    x = jnp.ones((200, 200))
    jax.block_until_ready(slow(x))
    waited = harness.measure(lambda: jax.block_until_ready(slow(x)), repeats=3).median
    assert harness.measure(lambda: slow(x), repeats=3).median > waited / 3


@pytest.mark.by_turns
@pytest.mark.parametrize("strategy", ["data", "fsdp", "pmap"])
def test_a_step_sends_the_gradients_once_and_nothing_else(strategy):
    tiny = ("model.hidden_dim=32", "model.depth=1", "model.num_heads=2", "model.mlp_dim=64", "model.stem=patch")
    mixing = ("augment.crop.probability=1.0", "augment.mixup.probability=0.5", "augment.cutmix.probability=0.5")
    strategies = (f"partition.strategy={strategy}", "partition.min_shard_elements=256")
    config = workload.make_config("improved_vit_tiny", 16, overrides=(*tiny, *mixing, *strategies))
    info = workload.make_info("improved_vit_tiny", image_size=8)
    partition = sharding.all_devices(strategy, min_shard_elements=256)
    trainer = workload.Trainer(config, info, partition, workload.random_resident(partition, info, 16))
    sent = program_cost.collective_bytes(trainer.compiled.as_text())
    state = jax.eval_shape(trainer.training.create_state, jax.random.key(0))
    parameter_bytes = summary.count_bytes(state.params)
    assert parameter_bytes <= sent["all-reduce"] <= parameter_bytes + 100
    assert scaling.only_gradients_once(strategy, sent, parameter_bytes)
    assert not scaling.only_gradients_once(strategy, sent | {"all-to-all": 3 * parameter_bytes}, parameter_bytes)
    assert not scaling.only_gradients_once(strategy, {"all-reduce": 2 * parameter_bytes}, parameter_bytes)


@pytest.mark.parametrize("limit", [8, 40, 200, 1000])
def test_the_largest_batch_that_fits_is_found(limit):
    tried = []

    def measure(job):
        tried.append(job.batch)
        return {"batch": job.batch} | ({"error": "out of memory"} if job.batch > limit else {}), None

    job = throughput.Job("lenet5", 32, 0, "float32", "data", 1, 1, (), 0, 0)
    row, _ = throughput.find_largest_batch(job, measure)
    assert row == {"batch": limit}
    assert len(tried) == len(set(tried)) < 20


def test_another_error_ends_the_search_for_the_largest_batch():
    def measure(job):
        return {"batch": job.batch} | ({"error": "no such luck"} if job.batch > 100 else {}), None

    job = throughput.Job("lenet5", 32, 0, "float32", "data", 1, 1, (), 0, 0)
    assert throughput.find_largest_batch(job, measure)[0] == {"batch": 64, "search ended by": "no such luck"}
    large = dataclasses.replace(job, batch=128)
    assert throughput.find_largest_batch(large, measure)[0] == {"batch": 128, "error": "no such luck"}


@pytest.mark.by_turns
def test_out_of_memory_is_a_row(tmp_path):
    command = [sys.executable, "-m", "benchmarks.throughput", "--model=lenet5", "--batch=8", "--batch=4096"]
    command += ["--repeats=1", "--memory_limit_gib=0.05", f"--out={tmp_path}"]
    ran = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"})
    assert ran.returncode == 0, ran.stderr
    report = json.loads((tmp_path / "throughput.json").read_text())
    small, large = report["rows"]
    assert small["train images/s"] > 0
    assert small["planned MiB"] < 51.2
    assert (large["batch"], large["error"]) == (4096, "out of memory")
    assert large["planned MiB"] > 51.2
    assert "train images/s" not in large
    assert {"run", "device", "versions", "date", "command"} <= set(report["about"])
    assert (tmp_path / "throughput.csv").read_text().splitlines()[0].startswith("model,batch,")


def test_trainings_are_summed_up_by_their_means(trained):
    row = lease.trained_row(lease.Part("tiny", [], "a goal", trained), 10.0)
    accuracy = json.loads((trained / "report" / "metrics.json").read_text())["accuracy"]
    assert (row["training"], row["seed"], row["test accuracy %"]) == ("tiny", 0, pytest.approx(100 * accuracy))
    better, other = row | {"seed": 1, "test accuracy %": 100 * accuracy + 2}, row | {"training": "other"}
    rows = lease.with_means([row, other, better])
    assert [line["seed"] for line in rows] == [0, 1, "mean of 2", 0, "mean of 1"]
    assert rows[2]["test accuracy %"] == pytest.approx(100 * accuracy + 1)
    assert rows[2]["deviation"] == pytest.approx(2**0.5)
    assert rows[4]["deviation"] is None


def test_a_training_that_has_ended_is_known_ever_after(trained, tmp_path, monkeypatch):
    monkeypatch.delattr(harness, "machine")  # it would take the devices from the next training
    part, other = (lease.Part(name, [], "a goal", trained / place) for name, place in (("a", ""), ("b", "..")))
    lease.Trainings(tmp_path).add(part, 10.0)
    again = lease.Trainings(tmp_path)
    assert part in again and other not in again
    again.add(part, None)
    report = json.loads((tmp_path / "trainings.json").read_text())
    rows = report["rows"]
    assert "cpu" in report["about"]["device"]
    assert [row["seed"] for row in rows] == [0, 0, "mean of 2"]
    assert [row.get("seconds of the command") for row in rows] == [10, None, None]  # one of them was stopped between
    with (tmp_path / "trainings.csv").open() as file:
        header, *lines = csv.reader(file)
    assert len(header) == len(set(header))
    assert [line[header.index("run")] for line in lines] == [harness.RUN] * 3


def test_a_lease_stops_in_time_and_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "_LEAST", 1)
    monkeypatch.setattr(lease, "_SECONDS_TO_SAVE", 3)
    begun = tmp_path / "begun"
    slow = (
        f"import pathlib, signal, time; signal.signal(15, lambda *_: exit(143)); open({str(begun)!r}, 'a').write('x')"
    )
    code = {
        "good": f"open({str(tmp_path / 'out' / 'table.md')!r}, 'w').write('1')",
        "bad": "exit(3)",
        "slow": f"{slow}; time.sleep(3600)",
        "never": "pass",
    }
    parts = [lease.Part(name, [sys.executable, "-c", text], "a goal") for name, text in code.items()]
    (tmp_path / "out" / "checkpoints").mkdir(parents=True)
    (tmp_path / "out" / "checkpoints" / "large").touch()
    start = time.monotonic()
    assert lease.run_all(parts, tmp_path / "out", dict(os.environ), start + 8) == 1  # one has failed
    assert time.monotonic() - start < 12
    rows = {row["part"]: row for row in json.loads((tmp_path / "out" / "lease.json").read_text())}
    assert {name: row["exit code"] for name, row in rows.items()} == {"good": 0, "bad": 3, "slow": None}
    with tarfile.open(tmp_path / "out" / "lease.tar.gz") as tar:
        assert set(tar.getnames()) == {"lease.json", "table.md"}
    parts[1] = parts[1]._replace(command=[sys.executable, "-c", "pass"])
    parts[2] = parts[2]._replace(command=[sys.executable, "-c", f"open({str(begun)!r}, 'a').write('y')"])
    (tmp_path / "out" / "table.md").unlink()
    assert lease.run_all(parts, tmp_path / "out", dict(os.environ), time.monotonic() + 60) == 0
    assert begun.read_text() == "xy" and not (tmp_path / "out" / "table.md").exists()  # what had ended is not repeated
    rows = json.loads((tmp_path / "out" / "lease.json").read_text())
    assert all(row["ended"] for row in rows) and len(rows) == 4


def test_the_parts_of_a_lease_are_commands_that_parse(tmp_path):
    """Every module is there and knows its flags, in the rehearsal too."""
    for tiny in (False, True):
        found = lease.parts(tmp_path, str(tmp_path), tiny=tiny)
        assert len({part.key for part in found}) == len(found)
        for part in found:
            if "benchmarks." in part.command[2]:
                module = importlib.import_module(part.command[2])
                with pytest.raises((UserError, SystemExit)) as caught:
                    module.main([*part.command[3:], "--no_such_flag"])
                assert "flag '--no_such_flag' is not known" in str(caught.value)


def test_a_step_agrees_with_the_cpu(capsys):
    row = agreement.compare("lenet5", "float32", 2, 0)
    assert row["good"] and row["loss differs by"] == 0 and row["loss"] == pytest.approx(np.log(10), rel=0.2)


def test_trainings_read_npz_files_where_there_are_some(tmp_path):
    (tmp_path / "cifar10.npz").touch()
    commands = {part.name: part.command for part in lease.parts(tmp_path / "out", str(tmp_path))}
    assert "--config.dataset.name=npz" in commands["sprint_cifar10"]
    assert f"--config.dataset.data_dir={tmp_path}/cifar10.npz" in commands["sprint_cifar10"]
    assert "--config.dataset.name=cifar100" in commands["vit_cifar100"]
    assert f"--config.dataset.data_dir={tmp_path}" in commands["vit_cifar100"]
    config = workload.make_config("lenet5", 8, overrides=workload.dataset_overrides("cifar10", str(tmp_path)))
    assert (config.dataset.name, config.dataset.data_dir) == ("npz", f"{tmp_path}/cifar10.npz")


@pytest.mark.by_turns
def test_a_peer_that_cannot_be_compared_is_a_row(monkeypatch):
    partition, info = sharding.all_devices("data"), workload.make_info("lenet5")
    trainer = workload.Trainer(workload.make_config("lenet5", 8), info, partition)

    def build(peer, module):  # LeNet-5 has 61,706 parameters
        return (lambda: None), {"keras": 61_706, "timm": 61_707}[peer]

    monkeypatch.setitem(versus._PEERS, "timm", versus._PEERS["keras"])
    monkeypatch.setitem(versus._PEERS, "torch", ("torch_peer", ("a_library_that_is_not_there",)))
    good, *bad = versus.against_peers(trainer, ["keras", "timm", "torch"], build, 1)
    assert good["peer"] == "keras" and good["peer / vitcls"] > 0
    assert [row["peer"] for row in bad] == ["timm", "torch"]
    assert bad[0]["error"] == "RuntimeError: it has 61,707 parameters, vitcls 61,706"
    assert bad[1]["error"] == "RuntimeError: a_library_that_is_not_there is not installed"


def test_a_peer_must_be_on_the_same_kind_of_device(monkeypatch):
    assert versus.load_peer("keras").PLATFORM == "cpu"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(RuntimeError, match="it runs on the cpu, vitcls on the gpu"):
        versus.load_peer("keras")


def test_an_epoch_has_other_peers_than_a_step():
    assert versus.choose_peers("", versus.EPOCH_PEERS) == ["keras", "torch"]
    with pytest.raises(UserError, match=r"peer 'timm' is not known\. Known: keras, torch"):
        versus.choose_peers("keras,timm", versus.EPOCH_PEERS)


@pytest.mark.by_turns
@pytest.mark.eight_devices
def test_one_and_two_cpu_devices_take_turns_on_one_batch():
    row = cpu_devices.describe("lenet5", 32, 8, ("model.hidden_width=8",), repeats=1)
    assert row["one device ms"] > 0 and row["one / two"] == pytest.approx(row["one device ms"] / row["two ms"])


def test_an_unknown_model_is_one_line_and_code_2():
    command = [sys.executable, "-m", "benchmarks.throughput", "--model=lenet6"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert (ran.returncode, len(ran.stderr.splitlines())) == (2, 1)
    assert "lenet5" in ran.stderr


def test_imports_are_quick_and_light():
    for module in ("vitcls", "vitcls.training.steps"):
        row = startup.import_row(module, repeats=1)
        assert row["loads"] == "none of them"
        assert row["seconds"] < 3 * row["limit"]  # the machine may be busy


def test_the_peak_is_that_of_the_longest_name_that_fits():
    assert workload.peak_tflops("NVIDIA H100 PCIe", "bfloat16") == 756
    assert workload.peak_tflops("NVIDIA H100 80GB HBM3", "bfloat16") == 989
    assert workload.peak_tflops("NVIDIA L40", "bfloat16") == 181
    assert workload.peak_tflops("NVIDIA H200", "float32") is None
    assert workload.peak_tflops("cpu", "bfloat16") is None


def parameters_of(model, image_size):
    image = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    shapes = jax.eval_shape(lambda image: model.init(jax.random.key(0), image, train=False), image)
    return summary.count_parameters(shapes["params"])


@pytest.mark.by_turns
@pytest.mark.parametrize("name", versus.MODELS)
def test_a_peer_is_the_same_network(name):
    from benchmarks.peers import keras_peer

    theirs = keras_peer.build(name, 64, 1000, **vit_fields(name))
    more = versus.MORE_PARAMETERS.get(("keras", name), 0)
    assert keras_peer.count_parameters(theirs) - more == parameters_of(models.create(name, 1000), 64)


@pytest.mark.by_turns
def test_the_peer_of_an_epoch_is_the_same_network():
    from benchmarks.peers import keras_peer

    images, labels = np.zeros((8, 32, 32, 3), np.uint8), np.arange(8)
    _, parameters = keras_peer.epoch(images, labels, 4, 0.5, 0.5, dtype="float32", **versus.EPOCH_MODEL)
    assert parameters == parameters_of(models.create("vit_tiny_patch4", 8, **versus.EPOCH_MODEL), 32)


def test_intervals_are_held_against_a_known_truth():
    rows = intervals.coverage(count=60, simulations=3, resamples=20)
    assert len(rows) == 18 and all({"percentile", "basic", "BCa"} <= row.keys() for row in rows)
    rng = np.random.default_rng(0)
    values = rng.exponential(size=200)
    jackknife = [np.delete(values, slice(4 * i, 4 * i + 4)).mean() for i in range(50)]
    resampled = rng.choice(values, (20_000, 200)).mean(axis=1)
    found = dict(intervals.intervals(np.array([values.mean(), *jackknife, *resampled])))
    for kind, method in (("percentile", "percentile"), ("basic", "basic"), ("BCa", "BCa")):
        expected = stats.bootstrap((values,), np.mean, method=method, n_resamples=20_000, rng=0).confidence_interval
        np.testing.assert_allclose(found[kind], expected, atol=0.01)


def test_orders_of_a_search_are_counted_as_they_are():
    """Against all of them: 720 of six combinations; of the grid 2! of its keys, by 2! and 3! of their values."""
    scores = np.random.default_rng(0).normal(size=(2, 3))
    drawn = np.array([np.maximum.accumulate(order) for order in itertools.permutations(scores.ravel())])
    grids = np.array(
        [
            np.maximum.accumulate(grid.ravel())
            for rows in itertools.permutations(range(2))
            for columns in itertools.permutations(range(3))
            for grid in (scores[np.ix_(rows, columns)], scores[np.ix_(rows, columns)].T)
        ]
    )
    found = search_orders.rows(scores, orders=4000)
    assert [row["trials"] for row in found] == [1, 2, 4, 6]
    for row in found:
        best, of_grid = drawn[:, row["trials"] - 1], grids[:, row["trials"] - 1]
        assert row["random, mean best"] == pytest.approx(best.mean())
        assert row["grid in any order, mean best"] == pytest.approx(of_grid.mean(), abs=0.05)
        assert row["random better"] == pytest.approx((best[:, None] > of_grid).mean(), abs=0.03)
        assert row["grid better"] == pytest.approx((best[:, None] < of_grid).mean(), abs=0.03)
        assert row["this grid, best"] == scores.ravel()[: row["trials"]].max()


def test_the_orders_of_a_search_need_a_whole_grid(tmp_path):
    with pytest.raises(UserError, match="holds no search"):
        search_orders.read(str(tmp_path))
    queue = ledger.start("", tmp_path)

    def end(number, rate, depths, state="finished"):
        queue.claim(f"{number:04d}", {})
        values = {"optimizer.learning_rate": rate, "model.depths": depths}
        queue.end(f"{number:04d}", 0, 1.0, "", {"values": values, "scores": {"5": number / 10}, "state": state})

    *others, last = enumerate(itertools.product((0.1, 0.2), ([2, 1], [4, 4], [7, 6])))
    for number, point in others:
        end(number, *point)
    end(6, *last[1], state="pruned")  # of less training than the others
    with pytest.raises(UserError, match="is no whole grid: 1 of 6 combinations have no score"):
        search_orders.read(str(tmp_path))
    end(last[0], *last[1])
    np.testing.assert_array_equal(search_orders.read(str(tmp_path)), np.arange(6).reshape(2, 3) / 10)
