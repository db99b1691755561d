"""The files of a workdir.

config.json      the resolved config          metrics.jsonl        events of training and evaluation
dataset.json     classes, shape, mean, std    checkpoints/<step>/  see checkpoint.py
moved.json       where the data are, once they have moved
frozen.json      SHA-256 of what the objective keeps fixed, such as a teacher
init.json        SHA-256 and preprocessing of the weights from which the run began
calibration.json what vitcls calibrate fitted and what it promises
unknown.json     above which score vitcls unknown calls an image known; its arrays are in unknown.npz
drift.json       what the answers to test images are like, for a server
served.json      which run is served for this one, and since when
corrections/     what users said of images, of a run of vitcls retrain
lock.json        who holds the workdir        report/, profile/    what was asked for
failed.json      who held it last, and why that run failed
"""

CONFIG_FILE = "config.json"
DATASET_FILE = "dataset.json"
MOVED_FILE = "moved.json"
FROZEN_FILE = "frozen.json"
INIT_FILE = "init.json"
UNKNOWN_FILE = "unknown.json"
UNKNOWN_ARRAYS = "unknown.npz"
CALIBRATION_FILE = "calibration.json"
DRIFT_FILE = "drift.json"
SERVED_FILE = "served.json"
CORRECTIONS = "corrections"
LOCK_FILE = "lock.json"
FAILED_FILE = "failed.json"
METRICS_FILE = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
MANIFEST = "manifest.json"  # of a checkpoint
RECORD = "record/metadata"  # of a checkpoint: what `Progress` knew, and the metrics
PROFILE = "profile"
