"""Where the benchmarks find CIFAR."""

import pathlib

DATA_DIR_HELP = "where TFDS keeps its sets, or a directory with cifar10.npz and cifar100.npz, which needs no TensorFlow"


def dataset_fields(name: str, data_dir: str) -> dict[str, str]:
    """Fields of a config for the set `name` of TFDS, or for `data_dir`/`name`.npz where that is a file."""
    file = pathlib.Path(data_dir, f"{name}.npz")
    if file.is_file():
        name, data_dir = "npz", str(file)
    return {"dataset.name": name, "dataset.data_dir": data_dir}
