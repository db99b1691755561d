"""How soon drift is found, and how often without one: made-up streams, and with --workdir the images of a run.

python -m benchmarks.drift
python -m benchmarks.drift --workdir=runs/digits
"""

import logging
import pathlib
import statistics
import sys

import numpy as np
from PIL import Image, ImageFilter

from benchmarks import harness
from vitcls import cli, predict
from vitcls.serve import drift
from vitcls.serve.detector import Detector
from vitcls.training import run_dir
from vitcls.training.opened import open_with_data

_TEN, _HUNDRED = np.full(10, 0.1), np.full(100, 0.01)
STREAMS = {  # name -> (distribution before, after)
    "one of 20 becomes one of 5": (np.array([0.95, 0.05]), np.array([0.8, 0.2])),
    "one of 10 classes is as frequent as all others": (_TEN, np.array([0.5] + [0.5 / 9] * 9)),
    "5 of 10 classes are left": (_TEN, np.repeat([0.2, 0.0], 5)),
    "50 of 100 classes are left": (_HUNDRED, np.repeat([0.02, 0.0], 50)),
}
_STREAM = 10_000  # observations
_BEFORE = 1_000  # of them before a change


def simulate(sample: int, streams: int) -> list[harness.Row]:
    """Alarms of a detector as a server has it, with a reference sample of `sample`."""
    rows = []
    for name, (before, after) in STREAMS.items():
        alarms, delays = 0, []
        for seed in range(streams):
            rng = np.random.default_rng(seed)
            detector = Detector(rng.multinomial(sample, before), delta=drift.DELTA, threshold=drift.THRESHOLD)
            alarms += sum(detector.update(x) for x in rng.choice(len(before), _STREAM, p=before).tolist()) > 0
            if seed < streams // 10:
                changed = enumerate(rng.choice(len(after), _STREAM, p=after).tolist(), 1)
                delays.append(next((count for count, x in changed if detector.update(x)), np.inf))
        found = statistics.median(delays)
        rows.append(
            {"change": name, "reference": sample, "streams": streams, "false alarms": alarms, "found after": found}
        )
    return rows


def changes(images: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """Images uint8 [N, H, W, C] as a server might come to see them."""
    noise = np.random.default_rng(0).normal(0, 20, images.shape)
    blur = ImageFilter.GaussianBlur(1)
    pictures = [Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image) for image in images]
    blurred = np.stack([np.asarray(picture.filter(blur)) for picture in pictures]).reshape(images.shape)
    return {
        "none": images,
        "the first half of the classes": images[labels < (labels.max() + 1) // 2],
        "noise (deviation 20 of 255)": np.clip(images + noise, 0, 255).astype(np.uint8),
        "half as bright": images // 2,
        "blurred (radius 1)": blurred,
    }


def measure(workdir: str, streams: int, data_dir: str) -> list[harness.Row]:
    """Of a run on its own test images: after how many answers each kind rings first, the median over streams."""
    reference = drift.reference(pathlib.Path(workdir))
    trained = run_dir.open_workdir(workdir)
    test = open_with_data(workdir, splits=("test",), data_dir=data_dir).dataset.test
    classify, judge = predict.make_classifier(trained), predict.make_judge(trained)
    chosen = np.random.default_rng(1).permutation(len(test.labels))[:1_000]
    usual, rows = None, []
    for name, images in changes(test.images[chosen], test.labels[chosen]).items():
        probabilities = classify(images)
        few = [judge(images[i : i + 32]) for i in range(0, len(images), 32)] if judge else [[None] * len(images)]
        answers = list(zip(probabilities.argmax(1), probabilities.max(1), np.concatenate(few), strict=True))
        usual = usual or answers
        first = [_first_alarms(reference, trained.info.num_classes, usual, answers, seed) for seed in range(streams)]
        kinds = {kind: statistics.median(alarms.get(kind, np.inf) for alarms in first) for kind in drift.KINDS[:4]}
        rows.append({"change": name, "streams": streams, **{k: v for k, v in kinds.items() if k != "corrections"}})
    return rows


def _first_alarms(reference, num_classes: int, usual: list, answers: list, seed: int) -> dict[str, int]:
    """kind -> answers since the change, after which it rang first; negative before."""
    rng, watch, first = np.random.default_rng(seed), drift.Drift(num_classes, reference), {}
    for count in range(1 - _BEFORE, _STREAM - _BEFORE):
        given = usual if count <= 0 else answers
        predicted, probability, unknown = given[rng.integers(len(given))]
        watch.observe(int(predicted), float(probability), unknown, None)
        first = dict.fromkeys(watch.alarms(), count) | first
    return first


def main(argv: list[str]) -> None:
    flags = cli.Parser(description=__doc__.splitlines()[0])
    flags.add_argument("--out", default="", help="directory for JSON, CSV and Markdown")
    flags.add_argument("--workdir", default="", metavar="DIR", help="of a run, which gets a drift.json")
    flags.add_argument("--data_dir", default="", metavar="DIR", help="where its data are now, if they have moved")
    flags.add_argument("--streams", type=int, metavar="N", help="default: 200 made-up ones, 5 of a run")
    args = flags.parse_args(argv)
    logging.getLogger("vitcls").setLevel(logging.ERROR)  # hundreds of alarms
    if args.workdir:
        rows = measure(args.workdir, args.streams or 5, args.data_dir)
    else:
        rows = [row for sample in (400, 2_000) for row in simulate(sample, args.streams or 200)]
    harness.publish("drift", rows, args.out)


if __name__ == "__main__":
    sys.exit(cli.run(main))
