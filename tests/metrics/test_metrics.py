"""Metrics agree with scikit-learn, plain loops and closed forms; what is masked is nowhere."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.metrics
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from vitcls import metrics
from vitcls.core.errors import RunError, UserError

BATCH = 64
evaluation_sums = jax.jit(metrics.evaluation_sums)


def examples(num_classes, seed=0, count=BATCH):
    """logits float32 [B, K], labels int32 [B], mask float32 [B], of which about a third is 0."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(count, num_classes)).astype(np.float32)
    labels = rng.integers(num_classes, size=count).astype(np.int32)
    logits[np.arange(count), labels] += rng.random(count) * 2
    return logits, labels, (rng.random(count) < 2 / 3).astype(np.float32)


def predictions(num_classes, count, seed=0, present=None):
    """labels int [N] (of the classes `present` only) and probabilities float32 [N, K]."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(np.arange(num_classes) if present is None else present, size=count)
    logits = rng.normal(size=(count, num_classes)) + 1.5 * np.eye(num_classes)[labels]
    return labels, softmax(logits).astype(np.float32)


def softmax(logits):
    exp = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return exp / exp.sum(axis=1, keepdims=True)


def names(num_classes):
    return [f"class {k}" for k in range(num_classes)]


def measure(labels, probabilities, class_names):
    return metrics.classification_report(metrics.evidence_of(labels, probabilities), class_names)


@pytest.mark.parametrize("num_classes", [2, 3, 5, 7, 30])
def test_the_sums_are_those_of_sklearn_on_what_is_not_masked(num_classes):
    logits, labels, mask = examples(num_classes)
    kept = mask > 0
    sums = jax.device_get(evaluation_sums(logits, labels, mask))
    logits, labels = logits[kept], labels[kept]
    classes = np.arange(num_classes)

    assert 0 < kept.sum() < BATCH
    assert sums["count"] == kept.sum()
    assert sums["correct"] == sklearn.metrics.accuracy_score(labels, logits.argmax(1), normalize=False)
    np.testing.assert_array_equal(
        sums["confusion"], sklearn.metrics.confusion_matrix(labels, logits.argmax(1), labels=classes)
    )
    assert sums["confusion"].dtype == np.int32
    np.testing.assert_allclose(
        sums["loss"], kept.sum() * sklearn.metrics.log_loss(labels, softmax(logits), labels=classes), rtol=1e-5
    )
    top5 = kept.sum()
    if num_classes > 5:
        top5 = sklearn.metrics.top_k_accuracy_score(labels, logits, k=5, labels=classes, normalize=False)
        assert top5 < kept.sum()
    assert sums["correct_top5"] == top5


def test_nothing_in_a_masked_example_can_reach_the_sums():
    logits, labels, mask = examples(7)
    clean = jax.device_get(evaluation_sums(logits, labels, mask))
    logits[mask == 0] = np.nan
    labels[mask == 0] = 99
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(evaluation_sums(logits, labels, mask)), clean)


def test_of_equal_logits_the_first_is_the_prediction():
    labels = np.array([0, 0, 4, 5, 6], np.int32)
    sums = jax.device_get(evaluation_sums(np.zeros((5, 7), np.float32), labels, np.ones(5, np.float32)))
    assert (sums["correct"], sums["correct_top5"]) == (2, 3)
    np.testing.assert_array_equal(sums["confusion"].sum(axis=0), [5, 0, 0, 0, 0, 0, 0])
    report = measure(labels, np.full((5, 7), 1 / 7, np.float32), names(7))
    assert (report["accuracy"], report["top5_accuracy"]) == (2 / 5, 3 / 5)


def test_a_model_that_has_diverged_gets_nothing_right():
    logits = np.full((4, 7), np.nan, np.float32)
    sums = jax.device_get(evaluation_sums(logits, np.arange(4, dtype=np.int32), np.ones(4, np.float32)))
    assert (sums["correct"], sums["correct_top5"], sums["count"]) == (0, 0, 4)
    assert np.isnan(sums["loss"])


def test_sums_of_half_precision_logits_are_float32():
    logits, labels, mask = examples(3)
    sums = evaluation_sums(logits.astype(jnp.bfloat16), labels, mask)
    assert {name: value.dtype for name, value in sums.items() if name != "confusion"} == dict.fromkeys(
        ("loss", "correct", "correct_top5", "count"), np.dtype("float32")
    )


def test_a_sharded_batch_gives_the_same_sums():
    batch = examples(7)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharded = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
    expected, sums = jax.device_get((evaluation_sums(*batch), evaluation_sums(*sharded)))
    assert sums.keys() == expected.keys()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), sums, expected)


def test_merged_sums_are_the_sums_of_the_whole():
    logits, labels, mask = examples(7, count=2 * BATCH)
    parts = [evaluation_sums(logits[i::2], labels[i::2], mask[i::2]) for i in range(2)]
    whole = evaluation_sums(logits, labels, mask)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), metrics.merge(*parts), whole)


def test_summarize_divides_by_the_count():
    logits, labels, mask = examples(30)
    summary = metrics.summarize(metrics.Evidence(jax.device_get(evaluation_sums(logits, labels, mask))))
    kept = mask > 0
    assert summary["accuracy"] == pytest.approx(np.mean(logits.argmax(1)[kept] == labels[kept]))
    loss = sklearn.metrics.log_loss(labels[kept], softmax(logits[kept]), labels=np.arange(30))
    assert summary["loss"] == pytest.approx(loss, rel=1e-5)
    assert summary.keys() == {"loss", "accuracy", "top5_accuracy"}
    assert all(type(value) is float for value in summary.values())


def test_summarize_refuses_an_empty_evaluation():
    logits, labels, _ = examples(3)
    with pytest.raises(UserError, match="no example to evaluate"):
        metrics.Evidence(jax.device_get(evaluation_sums(logits, labels, np.zeros(BATCH, np.float32))))


@pytest.mark.parametrize("num_classes", [3, 12])
def test_the_report_agrees_with_sklearn(num_classes):
    labels, probabilities = predictions(num_classes, 400)
    report = measure(labels, probabilities, names(num_classes))
    predicted = probabilities.argmax(1)
    oracle = sklearn.metrics.classification_report(labels, predicted, output_dict=True)
    hard = np.eye(num_classes)[predicted]
    auc = sklearn.metrics.roc_auc_score
    rows64 = probabilities.astype(np.float64) / probabilities.sum(1, keepdims=True, dtype=np.float64)
    expected = {
        "num_examples": 400,
        "loss": sklearn.metrics.log_loss(labels, rows64),
        "accuracy": oracle["accuracy"],
        "top5_accuracy": sklearn.metrics.top_k_accuracy_score(labels, rows64, k=5) if num_classes > 5 else 1.0,
        "precision_macro": oracle["macro avg"]["precision"],
        "recall_macro": oracle["macro avg"]["recall"],
        "f1_macro": oracle["macro avg"]["f1-score"],
        "auc_ovr_macro": auc(labels, rows64, multi_class="ovr", average="macro"),
        "auc_ovr_macro_hard": auc(labels, hard, multi_class="ovr", average="macro"),
    }
    assert {name: report[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    for k, row in enumerate(report["per_class"]):
        assert (row["class"], row["name"], row["num_examples"]) == (k, f"class {k}", np.sum(labels == k))
        wanted = [oracle[str(k)][name] for name in ("precision", "recall", "f1-score")]
        assert [row[name] for name in ("precision", "recall", "f1")] == pytest.approx(wanted)
        assert row["auc"] == pytest.approx(auc(labels == k, probabilities[:, k]))
        mistakes = np.bincount(predicted[(labels == k) & (predicted != k)], minlength=num_classes)
        assert row["most_confused_with"] == f"class {mistakes.argmax()}"


def test_on_a_balanced_split_macro_recall_is_accuracy():
    labels = np.repeat(np.arange(10), 30)
    _, probabilities = predictions(10, 300)
    report = measure(labels, probabilities, names(10))
    assert report["recall_macro"] == pytest.approx(report["accuracy"], abs=1e-12)
    assert report["precision_macro"] != pytest.approx(report["accuracy"], abs=1e-3)


def test_hard_auc_of_balanced_errors_has_a_closed_form():
    """(accuracy + 1 - (1 - accuracy) / (K - 1)) / 2: the .96 that goes with an accuracy of .92 on 100 classes."""
    num_classes, right = 5, 12
    labels = np.repeat(np.arange(num_classes), right + num_classes - 1)
    one_class = [np.r_[np.full(right, k), np.setdiff1d(np.arange(num_classes), k)] for k in range(num_classes)]
    report = measure(labels, np.eye(num_classes, dtype=np.float32)[np.concatenate(one_class)], names(num_classes))
    accuracy = right / (right + num_classes - 1)
    assert report["accuracy"] == pytest.approx(accuracy)
    assert report["auc_ovr_macro_hard"] == pytest.approx((accuracy + 1 - (1 - accuracy) / (num_classes - 1)) / 2)


def test_classes_that_do_not_occur_are_left_out_of_the_means():
    present = np.array([1, 4, 6])
    labels, probabilities = predictions(8, 200, present=present)
    report = measure(labels, probabilities, names(8))
    predicted = probabilities.argmax(1)
    assert not np.isin(predicted, present).all()  # some are taken for a class that does not occur
    precision, recall, f1, _ = sklearn.metrics.precision_recall_fscore_support(labels, predicted, labels=present)
    auc = [sklearn.metrics.roc_auc_score(labels == k, probabilities[:, k]) for k in present]
    expected = {"precision_macro": precision, "recall_macro": recall, "f1_macro": f1, "auc_ovr_macro": auc}
    for name, values in expected.items():
        assert report[name] == pytest.approx(np.mean(values)), name
    for row in report["per_class"]:
        undefined = [row[name] is None for name in ("precision", "recall", "f1", "auc")]
        assert undefined == [row["class"] not in present] * 4


def test_a_class_that_is_never_predicted_has_precision_zero():
    labels = np.array([0, 0, 1, 1])
    probabilities = np.array([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]], np.float32)
    report = measure(labels, probabilities, names(2))
    assert report["precision_macro"] == 0.25  # half of what is called 0 is 0; nothing is called 1
    assert (report["per_class"][1]["precision"], report["per_class"][1]["f1"]) == (0, 0)
    assert report["auc_ovr_macro"] == 1.0
    assert [row["most_confused_with"] for row in report["per_class"]] == [None, "class 0"]


def test_labels_of_one_class_leave_every_number_finite():
    _, probabilities = predictions(3, 20)
    report = measure(np.full(20, 2), probabilities, names(3))
    assert all(np.isfinite(value) for name, value in report.items() if name != "per_class")
    assert [row["auc"] for row in report["per_class"]] == [None] * 3
    assert metrics.roc_curves(np.full(20, 2), probabilities) is None


def test_a_certain_mistake_has_a_finite_loss():
    report = measure(np.array([0, 1]), np.eye(2, dtype=np.float32)[[0, 0]], names(2))
    assert report["loss"] == pytest.approx(-np.log(np.finfo(np.float32).eps) / 2)


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(UserError, match="no example to evaluate"):
        measure(np.zeros(0, int), np.zeros((0, 3), np.float32), names(3))
    with pytest.raises(RunError, match="not finite"):
        measure(np.zeros(2, int), np.full((2, 3), np.nan, np.float32), names(3))


def test_calibration_error_is_that_of_a_loop_over_the_bins():
    labels, probabilities = predictions(6, 500)
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    ece, counts = 0.0, []
    for i in range(15):
        inside = (confidence > i / 15) & (confidence <= (i + 1) / 15)
        counts.append(inside.sum())
        if inside.any():
            ece += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert measure(labels, probabilities, names(6))["ece"] == pytest.approx(ece, rel=1e-6)
    np.testing.assert_array_equal(metrics.reliability(labels, probabilities).count, counts)


def test_calibration_error_of_known_cases():
    sure = np.tile(np.float32([1, 0]), (8, 1))
    assert metrics.expected_calibration_error(np.zeros(8, int), sure) == 0
    assert metrics.expected_calibration_error(np.array([0, 1] * 4), sure) == 0.5
    bins = metrics.reliability(np.array([0, 1] * 4), sure, bins=4)
    np.testing.assert_array_equal(bins, [[0, 0, 0, 1], [0, 0, 0, 0.5], [0, 0, 0, 8]])
    on_an_edge = np.tile(np.float32([0.75, 0.25]), (8, 1))
    assert metrics.reliability(np.zeros(8, int), on_an_edge, bins=4).count.tolist() == [0, 0, 8, 0]


def test_roc_curves_have_the_areas_of_sklearn():
    labels, probabilities = predictions(8, 300, present=np.arange(7))
    curves = metrics.roc_curves(labels, probabilities, worst=3)
    auc = sklearn.metrics.roc_auc_score
    areas = {k: auc(labels == k, probabilities[:, k]) for k in range(7)}
    assert curves.macro.auc == pytest.approx(np.mean(list(areas.values())))
    assert curves.micro.auc == pytest.approx(auc(np.eye(8)[labels].ravel(), probabilities.ravel()))
    assert list(curves.worst) == sorted(areas, key=areas.get)[:3]
    for k, curve in curves.worst.items():
        assert curve.auc == pytest.approx(areas[k])
    x, y, _ = curves.macro
    assert np.trapezoid(y, x) == pytest.approx(curves.macro.auc, abs=2e-3)
    for x, y, _ in (curves.micro, curves.macro, *curves.worst.values()):
        assert (x[0], y[0], x[-1], y[-1]) == (0, 0, 1, 1)
        assert (np.diff(x) >= 0).all() and (np.diff(y) >= 0).all()


@pytest.mark.parametrize("decimals", [1, 2, 8])
@pytest.mark.parametrize("num_classes", [2, 40])
def test_areas_are_exact_whatever_the_ties(num_classes, decimals):
    labels, probabilities = predictions(num_classes, 1500, present=np.append(np.arange(num_classes), 0))
    probabilities = probabilities.round(decimals)
    aucs = metrics.roc_curves(labels, probabilities).aucs
    expected = [sklearn.metrics.roc_auc_score(labels == k, probabilities[:, k]) for k in range(num_classes)]
    np.testing.assert_allclose(aucs, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("decimals", [1, 3, 8])
def test_a_curve_of_many_examples_is_short_and_near_the_exact_one(decimals):
    labels, probabilities = predictions(3, 9000)
    probabilities = probabilities.round(decimals)
    curves = metrics.roc_curves(labels, probabilities)
    exact = {k: sklearn.metrics.roc_curve(labels == k, probabilities[:, k])[:2] for k in range(3)}
    pairs = [(curves.worst[k], exact[k]) for k in range(3)]
    pairs.append((curves.micro, sklearn.metrics.roc_curve(np.eye(3)[labels].ravel(), probabilities.ravel())[:2]))
    for curve, (x, y) in pairs:
        drawn = np.stack(curve[:2], axis=1)
        assert len(drawn) <= 2004
        assert max(distance(corner, drawn) for corner in np.stack([x, y], axis=1)[::9]) <= 1e-3
        assert curve.auc == pytest.approx(np.trapezoid(y, x), abs=1e-4 if curve is curves.micro else 1e-12)


def distance(point, line):
    """Between a point [2] and a line through points [n, 2]."""
    start, along = line[:-1], np.diff(line, axis=0)
    share = ((point[None] - start) * along).sum(axis=1) / np.maximum((along**2).sum(axis=1), 1e-30)
    nearest = start + np.clip(share, 0, 1)[:, None] * along
    return np.hypot(*(nearest - point[None]).T).min()


def test_importing_the_metrics_loads_no_heavy_library():
    code = (
        "import sys, vitcls.metrics; "
        "print(sorted({'sklearn', 'matplotlib', 'tensorflow', 'orbax', 'scipy.stats'} & set(sys.modules)))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
