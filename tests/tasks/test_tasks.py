"""Training objectives against the same loss written out by hand, and through whole runs."""

import dataclasses
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import scipy.special

from vitcls import config as configs
from vitcls import main, predict
from vitcls.core.errors import UserError
from vitcls.metrics import METRICS, Metric
from vitcls.tasks import TASKS, Aux, Context, Task, TrainedRun
from vitcls.tasks.base import Output, Tools
from vitcls.tasks.distill import Distill
from vitcls.tasks.simclr import nt_xent
from vitcls.train import prepare, train_and_evaluate
from vitcls.training import checkpoint, run_dir
from vitcls.training.metrics_log import read_history

pytestmark = pytest.mark.usefixtures("no_pictures")
B, K = 6, 4


def log_softmax(x):
    x = x.astype(np.float64)
    return x - scipy.special.logsumexp(x, axis=-1, keepdims=True)


class Lesson:
    """A teacher whose logits are given."""

    def __init__(self, logits):
        self.logits = jnp.asarray(logits)

    def apply(self, variables, images, *, train):
        assert not train
        return self.logits + variables["params"]["shift"]


@pytest.mark.parametrize("hard", [False, True])
def test_distillation_is_that_of_hinton_or_of_deit(hard):
    rng = np.random.default_rng(0)
    student, teacher, own = rng.normal(size=(B, K)), rng.normal(size=(B, K)), rng.uniform(size=B)
    run = TrainedRun(
        Lesson(teacher), {"params": {"shift": np.zeros((1, K))}}, ("a", "b", "c", "d"), (2, 2, 1), lambda x: x
    )
    context = Context(
        run.class_names, run.image_shape, lambda logits, targets: jnp.asarray(own), lambda path: run, None
    )
    task = Distill(teacher="there", temperature=3.0, weight=0.7, hard=hard).build(context)
    forward = lambda params, stats, images, key: Output(jnp.asarray(student), stats, {})  # noqa: E731
    tools = Tools(forward, None, None, lambda params: params, None, None, K, None)
    inputs = {"image": None, "lesson": None, "target": jnp.eye(K)[np.arange(B) % K]}
    losses, aux = task.loss(tools, {}, {}, inputs, None, task.frozen(), None)

    p, q = np.exp(log_softmax(teacher / 3)), log_softmax(student / 3)
    soft = 9 * np.sum(p * (np.log(p) - q), axis=1)
    taught = -log_softmax(student)[np.arange(B), teacher.argmax(1)] if hard else soft
    np.testing.assert_allclose(losses, 0.3 * own + 0.7 * taught, rtol=1e-5)
    np.testing.assert_array_equal(aux.sums["agrees"], student.argmax(1) == teacher.argmax(1))
    np.testing.assert_array_equal(aux.sums["correct"], student.argmax(1) == np.arange(B) % K)


def test_nt_xent_is_that_of_the_paper():
    """Equation 1 of Chen et al. 2020, pair by pair."""
    z = np.random.default_rng(0).normal(size=(B, 2, 5))
    losses, found = nt_xent(jnp.asarray(z, jnp.float32), lambda x: x, jnp.arange(B), 0.5)
    unit = (z / np.linalg.norm(z, axis=-1, keepdims=True)).reshape(2 * B, 5)
    similarity = unit @ unit.T / 0.5

    def pair(i, j):
        others = [k for k in range(2 * B) if k != i]
        return -similarity[i, j] + np.log(np.exp(similarity[i, others]).sum()), max(others, key=similarity[i].item) == j

    for image in range(B):
        (there, hit), (back, hit_back) = pair(2 * image, 2 * image + 1), pair(2 * image + 1, 2 * image)
        assert losses[image] == pytest.approx((there + back) / 2, rel=1e-5)
        assert found[image] == (hit + hit_back) / 2


@dataclasses.dataclass(frozen=True)
class MeanTeacher:
    """A task with a state of its own: an average of the parameters teaches (Tarvainen & Valpola 2017)."""

    decay: float = 0.5

    def build(self, context):
        def loss(tools, params, batch_stats, inputs, extra, frozen, key):
            output = tools.forward(params, batch_stats, inputs["image"], key)
            lesson = tools.forward(jax.lax.stop_gradient(extra["teacher"]), batch_stats, inputs["image"], key).logits
            gap = jnp.mean((output.logits - lesson) ** 2, axis=-1)
            correct = jnp.argmax(output.logits, axis=-1) == jnp.argmax(inputs["target"], axis=-1)
            sums = {"correct": correct, "gap": gap}
            return context.loss(output.logits, inputs["target"]) + gap, Aux(output.batch_stats, sums, lesson)

        def update(extra, updated):
            teacher = jax.tree.map(lambda t, p: self.decay * t + (1 - self.decay) * p, extra["teacher"], updated.params)
            queue = jnp.concatenate([updated.rows, extra["queue"]])[: len(extra["queue"])]
            gaps = extra["gaps"] + updated.sums["gap"]
            return {"teacher": teacher, "gaps": gaps, "updates": updated.step + 1, "queue": queue}

        return Task(
            loss,
            init=lambda key, variables: {
                "teacher": jax.tree.map(jnp.copy, variables["params"]),
                "gaps": jnp.zeros(()),
                "updates": jnp.zeros((), jnp.int32),
                "queue": jnp.zeros((40, 3)),
            },
            update=update,
            means={"accuracy": "correct", "gap": "gap"},
            eval_sums={"confidence": confidence},
        )


def confidence(apply, variables, images, labels, bank):
    return jnp.max(jax.nn.softmax(apply(variables, images).logits), axis=-1)


@pytest.fixture
def mean_teacher(monkeypatch):
    monkeypatch.setitem(TASKS._entries, "mean_teacher", MeanTeacher)
    monkeypatch.setitem(
        METRICS,
        "confidence",
        Metric(
            "confidence",
            "fraction",
            "Confidence",
            "{:.2%}",
            True,
            lambda e: e.mean("confidence"),
            task_sum="confidence",
        ),
    )


def with_task(config, name, trained):
    """The tiny config with the objective `name`; one device sees what eight do."""
    config.task = {"name": name} | ({"teacher": str(trained)} if name == "distill" else {})
    config.augment.crop.probability, config.augment.mixup.probability = 1.0, 0.0
    return config


@pytest.mark.by_turns
@pytest.mark.parametrize(("name", "strategy"), [("distill", "pmap"), ("simclr", "fsdp"), ("mean_teacher", "pmap")])
def test_a_run_goes_on_to_the_same_bits(name, strategy, tiny_config, trained, tmp_path, mean_teacher):
    config = with_task(tiny_config, name, trained)
    config.partition.strategy = strategy
    results = train_and_evaluate(config, tmp_path / "run")
    again = tmp_path / "again"
    shutil.copytree(tmp_path / "run", again)
    for step in checkpoint.steps(again / "checkpoints")[1:]:
        shutil.rmtree(again / "checkpoints" / str(step))
    resumed = train_and_evaluate(config, again)
    assert resumed["loss"] == results["loss"] and resumed["accuracy"] == results["accuracy"]
    timed = ("train/images_per_second", "train/seconds")
    whole, rest = (
        [{key: value for key, value in event.items() if key not in timed} for event in read_history(path)]
        for path in (tmp_path / "run", again)
    )
    assert whole == rest
    logged = {"distill": "train/teacher_agreement", "simclr": "train/pairs_found", "mean_teacher": "train/gap"}[name]
    assert all(0 <= event[logged] <= 1 for event in whole if "train/loss" in event)


@pytest.mark.by_turns
@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_what_a_task_keeps_is_updated_with_each_step_and_saved(tiny_config, trained, tmp_path, mean_teacher):
    """The same under one strategy as under another; the teacher lags behind the parameters as its decay says."""
    kept = {}
    for strategy in ("data", "fsdp"):
        config = with_task(tiny_config, "mean_teacher", trained)
        config.partition.strategy, config.partition.min_shard_elements = strategy, 16
        config.total, config.checkpoint_every, config.steps_per_call = "3 steps", "1 steps", 1
        train_and_evaluate(config, tmp_path / strategy)
        kept[strategy] = {}
        for step in (2, 3):
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
                state = reader.restore(tmp_path / strategy / "checkpoints" / str(step) / "tree")["state"]
            kept[strategy][step] = {name: jax.device_get(state[name]) for name in ("params", "task")}
    before, after = kept["data"][2], kept["data"][3]
    np.testing.assert_array_equal(after["task"]["queue"][16:40], before["task"]["queue"][:24])
    assert np.abs(after["task"]["queue"][:16]).min() > 0  # the lessons of the newest batch
    assert before["task"]["updates"] == 2 and after["task"]["updates"] == 3
    assert after["task"]["gaps"] > before["task"]["gaps"] > 0
    expected = jax.tree.map(lambda t, p: 0.5 * t + 0.5 * p, before["task"]["teacher"], after["params"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), after["task"]["teacher"], expected)
    both = (kept[strategy][3]["task"] for strategy in ("data", "fsdp"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-4), *both)


@pytest.mark.by_turns
def test_a_task_has_metrics_of_its_own(tiny_config, trained, tmp_path, mean_teacher):
    config = with_task(tiny_config, "mean_teacher", trained)
    config.checkpoint.metric = "eval/confidence"
    results = train_and_evaluate(config, tmp_path / "run")
    probabilities = np.load(tmp_path / "run" / "report" / "predictions.npz")["probabilities"]
    assert results["confidence"] == pytest.approx(probabilities.max(axis=1).mean(), rel=1e-5)
    evaluations = [event["eval/confidence"] for event in read_history(tmp_path / "run") if "eval/loss" in event]
    assert len(evaluations) == 2 and all(1 / 3 <= value <= 1 for value in evaluations)
    page = (tmp_path / "run" / "report" / "index.html").read_text(encoding="utf-8")
    assert f"{results['confidence']:.2%}" in page
    config = with_task(tiny_config, "distill", trained)  # which does not give it
    with pytest.raises(UserError, match=r"config.checkpoint.metric 'eval/confidence' is not known"):
        prepare(config, None, "", range(0))


@pytest.mark.by_turns
def test_a_metric_that_is_not_defined_does_not_cost_the_report(tiny_config, tmp_path, monkeypatch):
    nowhere = Metric("nowhere", "fraction", "Nowhere", "{:.2%}", True, lambda evidence: float("nan"), "nothing", "none")
    monkeypatch.setitem(METRICS, "nowhere", nowhere)
    assert train_and_evaluate(tiny_config, tmp_path / "run")["nowhere"] is None
    assert json.loads((tmp_path / "run" / "report" / "metrics.json").read_text())["nowhere"] is None
    assert "<span>Nowhere</span><b>–</b>" in (tmp_path / "run" / "report" / "index.html").read_text(encoding="utf-8")


@pytest.mark.by_turns
def test_a_teacher_may_move_but_not_change(tiny_config, trained, tmp_path, capfd):
    from vitcls.cli import quiet_libraries

    quiet_libraries()
    teacher = tmp_path / "teacher"
    shutil.copytree(trained, teacher)
    train_and_evaluate(with_task(tiny_config, "distill", teacher), tmp_path / "run")
    assert f"teacher   improved_vit_tiny of {teacher}, step 12 of 12" in capfd.readouterr().err
    teacher = teacher.rename(tmp_path / "moved")
    config = with_task(tiny_config, "distill", teacher)
    train_and_evaluate(config, tmp_path / "run")
    shutil.rmtree(teacher / "checkpoints" / "12")
    with pytest.raises(UserError, match=r"what config.task keeps fixed .a teacher's weights. is not what the run in"):
        train_and_evaluate(config, tmp_path / "run")


@pytest.mark.by_turns
def test_nothing_of_a_teacher_is_saved_and_it_is_not_needed_afterwards(tiny_config, trained, tmp_path):
    teacher = tmp_path / "teacher"
    shutil.copytree(trained, teacher)
    plain = train_and_evaluate(tiny_config, tmp_path / "plain")
    config = with_task(tiny_config, "distill", teacher)
    train_and_evaluate(config, tmp_path / "run")
    trees = []
    for name in ("plain", "run"):
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            tree = reader.metadata(tmp_path / name / "checkpoints" / "12" / "tree").item_metadata.tree
        trees.append({jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(tree)})
    assert trees[0] == {path: shape for path, shape in trees[1].items() if "agrees" not in path}
    assert set(plain) == set(json.loads((tmp_path / "run" / "report" / "metrics.json").read_text())) - {"units"}
    shutil.rmtree(teacher)
    from vitcls.evaluate import evaluate

    assert evaluate(tmp_path / "run")["num_examples"] == plain["num_examples"]
    with pytest.raises(UserError, match="teacher is not the workdir of a run"):
        train_and_evaluate(config, tmp_path / "run")


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ({"name": "distil"}, "config.task.name 'distil' is not known; did you mean 'distill'?"),
        ({"name": "distill"}, "config.task.teacher='' names no workdir"),
        ({"name": "distill", "teacher": "/nowhere"}, "/nowhere is not the workdir of a run"),
        ({"name": "distill", "temprature": 2.0}, "key of config.task 'temprature' is not known; did you mean 'temper"),
        ({"name": "distill", "weight": 2.0}, "config.task.weight=2.0 is impossible; it must be in [0, 1]"),
        ({"name": "simclr", "temperature": 0.0}, "config.task.temperature=0.0 is impossible"),
        ({"name": "simclr", "neighbors": "many"}, "config.task.neighbors='many' is impossible; it must be a whole"),
        ({"name": "classify", "teacher": "x"}, "key of config.task 'teacher' is not known"),
        ({"name": "distill", "teacher": "gs://b/x"}, "config.task.teacher='gs://b/x' is a URL; it must be a path"),
    ],
)
def test_what_a_task_cannot_do_is_said_with_its_key(task, words, tiny_config):
    tiny_config.task = task
    with pytest.raises(UserError, match=re.escape(words)):
        prepare(tiny_config, None, "", range(0))


def test_a_teacher_of_other_classes_or_sizes_is_refused(tiny_config, trained):
    config = with_task(tiny_config, "distill", trained)
    config.dataset.image_size = 16
    with pytest.raises(
        UserError, match=r"config.task.teacher='.*' was trained on images of 8x8x3, this run on 16x16x3"
    ):
        prepare(config, None, "", range(0))
    config.dataset.update(image_size=8, num_classes=4)
    with pytest.raises(UserError, match=r"config.task.teacher='.*' was trained on other classes"):
        prepare(config, None, "", range(0))


def test_a_contrastive_loss_is_of_a_whole_batch(tiny_config):
    tiny_config.task = {"name": "simclr"}
    tiny_config.optimizer.accumulate, tiny_config.augment.mixup.probability = 2, 0.0
    with pytest.raises(UserError, match=r"accumulate=2 is not for config.task.name='simclr'"):
        prepare(tiny_config, None, "", range(0))


def test_a_task_with_a_loss_of_its_own_says_that_the_keys_of_another_do_not_count(tiny_config, tmp_path, capfd):
    from vitcls.cli import quiet_libraries

    quiet_libraries()
    tiny_config.task, tiny_config.augment.mixup.probability = {"name": "simclr"}, 0.0
    tiny_config.loss.label_smoothing = 0.1
    train_and_evaluate(tiny_config, tmp_path / "run", dry_run=True)
    assert "task simclr, whose loss is its own: of config.loss only l2 counts" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"losses": lambda x: x[:, None]}, "the task's loss has shape (16, 1); it must be (16,)"),
        ({"losses": lambda x: x.sum()}, "the task's loss has shape (); it must be (16,)"),
        ({"sums": {"count": jnp.zeros(16)}}, "the task's sum 'count' is the step's own name"),
        ({"sums": {"hits": jnp.zeros(())}}, "the task's sum 'hits' has shape (), not (16,) and more"),
        ({"means": {"hits": "hit"}}, "the task's mean 'hits' is of the sum 'hit', which its loss must give as (16,)"),
        ({"means": {"loss": "hits"}}, "the task's mean 'loss' is logged by every step already; rename it"),
    ],
)
def test_a_task_that_cannot_be_right_is_told_so(wrong, words, tiny_config, tmp_path, monkeypatch):
    @dataclasses.dataclass(frozen=True)
    class Wrong:
        def build(self, context):
            def loss(tools, params, batch_stats, inputs, extra, frozen, key):
                output = tools.forward(params, batch_stats, inputs["image"], key)
                losses = wrong.get("losses", lambda x: x)(context.loss(output.logits, inputs["target"]))
                return losses, Aux(output.batch_stats, wrong.get("sums", {"hits": jnp.zeros(16)}))

            return Task(loss, means=wrong.get("means", {}))

    monkeypatch.setitem(TASKS._entries, "wrong", Wrong)
    tiny_config.task = {"name": "wrong"}
    with pytest.raises(ValueError, match=re.escape(words)):
        train_and_evaluate(tiny_config, tmp_path / "run", dry_run=True)


def test_a_name_on_the_command_line_decides_the_keys_of_its_block(tmp_path):
    file = tmp_path / "config.py"
    file.write_text(
        "from vitcls.config import default_config\ndef get_config():\n    c = default_config('improved_vit_tiny')\n"
        "    c.model.depth = 3\n    return c\n"
    )
    flags = [f"--config={file}", "--workdir=x"]
    config = main.parse([*flags, "--config.task.temperature=2", "--config.task.name=distill"]).config
    assert config.task.to_dict() == configs.default_config("lenet5", "distill").task.to_dict() | {"temperature": 2.0}
    assert main.parse(flags).config.task.to_dict() == {"name": "classify"}
    config = main.parse([*flags, "--config.model.widths=(4, 8, 8)", "--config.model.name=lenet5"]).config
    assert config.model.widths == (4, 8, 8) and "depth" not in config.model
    assert main.parse([*flags, "--config.model.name=improved_vit_tiny"]).config.model.depth == 3
    with pytest.raises(UserError, match=r"key of config.task 'temprature' is not known; did you mean 'temperature'"):
        main.parse([*flags, "--config.task.name=distill", "--config.task.temprature=2"])
    with pytest.raises(UserError, match=r"--config.task.teacher is a key of another objective; add .*name=distill"):
        main.parse([*flags, "--config.task.teacher=x"])
    file.write_text(file.read_text().replace("c.model.depth = 3", "c.task.teacher = 'x'"))
    with pytest.raises(
        UserError,
        match=r"sets 'teacher', which is no key there; it belongs to the task 'distill'",
    ):
        main.parse(flags)


def test_a_config_without_a_task_is_of_classification(tiny_config):
    values = json.loads(configs.to_json(configs.resolve(tiny_config)))
    del values["task"]
    assert configs.from_json(json.dumps(values)).task.to_dict() == {"name": "classify"}
    assert set(TASKS) == {"adversarial", "certified", "classify", "distill", "simclr"}


@pytest.mark.by_turns
def test_features_without_labels_have_no_classifier_to_predict_with(tiny_config, trained, tmp_path):
    train_and_evaluate(with_task(tiny_config, "simclr", trained), tmp_path / "run")
    opened = run_dir.open_workdir(tmp_path / "run")
    with pytest.raises(UserError, match=r"a run of config.task.name='simclr' has no classifier; evaluate it"):
        list(predict.predict(opened, [tmp_path / "x.png"]))
