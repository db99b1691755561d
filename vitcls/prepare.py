"""Download and prepare a data set of TFDS, so that training finds it.

    python -m vitcls.prepare NAME [--data_dir=DIR]
"""

import pathlib
import shutil
import sys

from vitcls import cli
from vitcls.data.tfds import BUILT_IN, find_builder
from vitcls.errors import RunError, UserError


def prepare(name: str, data_dir: str = "") -> pathlib.Path:
    """Prepares the set `name` and returns where it is; nothing that is half done stays.

    Raises UserError for an unknown name, RunError where it cannot be downloaded or must be fetched by hand.
    """
    if name in BUILT_IN:
        raise UserError(f"'{name}' needs no preparation; it is used through config.dataset.name='{name}'")
    builder = find_builder(name, data_dir)
    place = pathlib.Path(builder.data_dir)
    if builder.info.splits:
        return place
    root = next(parent for parent in (place, *place.parents) if parent.exists())
    before = set(root.rglob("*"))
    try:
        builder.download_and_prepare()
    except (Exception, KeyboardInterrupt) as error:  # TFDS fails in every way a network and an archive can
        for path in sorted(set(root.rglob("*")) - before, reverse=True):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise RunError(
            f"'{name}' could not be prepared in {place}: {reason}. It needs the network, or files that you fetch "
            "yourself; nothing half-written was left"
        ) from None
    return place


def main(argv: list[str]) -> None:
    parser = cli.Parser(prog="python -m vitcls.prepare", description=__doc__.splitlines()[0])
    parser.add_argument("name", metavar="NAME", help="such as cifar100, cifar10, mnist, fashion_mnist, imagenet2012")
    parser.add_argument("--data_dir", default="", help="default: $TFDS_DATA_DIR or ~/tensorflow_datasets, as TFDS has it")
    flags = parser.parse_args(argv)
    print(f"{flags.name} is prepared in {prepare(flags.name, flags.data_dir)}")


if __name__ == "__main__":
    sys.exit(cli.run(main))
