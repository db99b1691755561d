"""Where images come from, one file each: a frozen dataclass with `load(config) -> Source`.

`config` is the block `dataset` of a config, of whose keys its own fields are some.
"""

from vitcls.core.registry import Registry
from vitcls.data.dataset import Source
from vitcls.data.settings import DatasetSettings

TFDS = "tfds"  # the source of every name that is not in the table
PLACELESS = ("digits", "synthetic", "synthetic_jpeg")  # sources whose images are in no directory
SOURCES = Registry(
    "config.dataset",
    {
        "digits": "vitcls.data.sources.digits:Digits",
        "synthetic": "vitcls.data.sources.synthetic:Synthetic",
        "synthetic_jpeg": "vitcls.data.sources.synthetic_jpeg:SyntheticJpeg",
        "folder": "vitcls.data.sources.folder:Folder",
        "npz": "vitcls.data.sources.npz:Npz",
        TFDS: "vitcls.data.sources.tfds:Tfds",
    },
    shared=DatasetSettings,
)


def source_of(name: str) -> str:
    """The entry of SOURCES for a `config.dataset.name`."""
    return name if name in SOURCES else TFDS


def load_source(config) -> Source:
    """The source that the block `dataset` of a config names; raises UserError where it is not there."""
    return SOURCES.create(source_of(config.name), config).load(config)
