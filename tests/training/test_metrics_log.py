import json
import time

import pytest

from vitcls.training.metrics_log import METRICS_FILE, MetricWriter, read_history


def write(workdir, steps, rewind_to=0):
    with MetricWriter(workdir, rewind_to=rewind_to) as writer:
        for step in steps:
            writer.write(step, {"train/loss": 1.0 / step})


def test_a_resumed_run_says_nothing_twice(tmp_path):
    write(tmp_path, [1, 2, 3, 4])
    write(tmp_path, [3, 4, 5], rewind_to=2)
    assert [event["step"] for event in read_history(tmp_path)] == [1, 2, 3, 4, 5]


def test_a_line_cut_short_by_a_kill_is_dropped(tmp_path):
    write(tmp_path, [1, 2])
    with open(tmp_path / METRICS_FILE, "a") as file:
        file.write('{"step": 3, "train/lo')
    assert [event["step"] for event in read_history(tmp_path)] == [1, 2]
    write(tmp_path, [3], rewind_to=2)
    assert [json.loads(line)["step"] for line in (tmp_path / METRICS_FILE).read_text().splitlines()] == [1, 2, 3]


def test_values_that_are_not_finite_stay_readable_json(tmp_path):
    with MetricWriter(tmp_path, rewind_to=0) as writer:
        writer.write(1, {"eval/loss": float("nan"), "eval/accuracy": 0.5})
    assert json.loads((tmp_path / METRICS_FILE).read_text()) == {"step": 1, "eval/loss": None, "eval/accuracy": 0.5}


def test_tensorboard_reads_the_same_numbers(tmp_path):
    """Those that a resumed run says again only once."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write(tmp_path, [1, 2, 4])
    time.sleep(1.1)  # events have the second of their writer in the name of their file
    write(tmp_path, [3, 5], rewind_to=2)
    accumulator = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0})
    accumulator.Reload()
    events = [json.loads(line) for line in (tmp_path / METRICS_FILE).read_text().splitlines()]
    assert [event["step"] for event in events] == [1, 2, 3, 5]
    told = [(event.step, pytest.approx(event.value)) for event in accumulator.Scalars("train/loss")]
    assert told == [(event["step"], event["train/loss"]) for event in events]
