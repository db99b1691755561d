"""Download and prepare a data set of TFDS, so that training finds it.

vitcls prepare NAME [--data_dir=DIR]
"""

import contextlib
import logging
import multiprocessing
import os
import pathlib
import shutil
import signal
import sys
import textwrap
from collections.abc import Iterator

from vitcls import cli
from vitcls.core import buckets
from vitcls.core.errors import RunError, Stopped, UserError
from vitcls.data.sources.tfds import BUILT_IN, find_builder


def prepare(name: str, data_dir: str = "") -> tuple[pathlib.Path, bool]:
    """Prepares the set `name`, unless it is; returns where it is, and whether there was anything to do.

    Nothing half done stays; archives that were downloaded to their end stay for the next try. Raises UserError for an
    unknown name, RunError where the set cannot be downloaded or must be fetched by hand, Stopped after a signal.
    """
    if name in BUILT_IN:
        raise UserError(f"'{name}' needs no preparation; it is used through config.dataset.name='{name}'")
    if buckets.is_url(data_dir):
        raise UserError(f"--data_dir={data_dir} is a URL; prepare '{name}' on a disk, and copy the directory there")
    builder = find_builder(name, data_dir)
    place = pathlib.Path(builder.data_dir)
    if builder.info.splits:
        return place, False
    if place.exists():
        raise RunError(f"{place} is there, but holds no prepared data set; move it away and prepare '{name}' again")
    root = place.parents[builder.info.full_name.count("/")]  # place is root/name[/config]/version
    downloads = root / "downloads" / builder.name  # as TFDS has it
    with _nothing_half_done([root / builder.name, downloads]), cli.sigterm_raises():
        try:
            failure = _prepare_in_child(name, data_dir, downloads)
        except KeyboardInterrupt as interrupt:
            raise Stopped(cli.exit_code(interrupt), "stopped; nothing half done was left") from None
        if failure is not None:
            raise RunError(
                f"'{name}' could not be prepared in {place}: {failure}. It needs the network, or files that you fetch "
                f"yourself into {root / 'downloads' / 'manual'}; nothing half done was left"
            )
    return place, True


def _prepare_in_child(name: str, data_dir: str, downloads: pathlib.Path) -> str | None:
    """Runs TFDS in a process of its own; returns why it failed, or None.

    Its download threads cannot be stopped, but a process can: when this returns or raises, nothing is written any more.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_download_and_prepare, args=(name, data_dir, downloads, sender), daemon=True)
    child.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        child.join()
        return f"the process ended with code {child.exitcode}"
    finally:
        child.kill()
        child.join()


def _download_and_prepare(name: str, data_dir: str, downloads: pathlib.Path, sender) -> None:
    """Sends None through `sender` once the set is prepared, else the reason why not."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    cli.quiet_libraries()
    logging.disable(logging.WARNING)  # every attempt to connect would be told of
    import tensorflow_datasets
    from tensorflow_datasets.core.download import downloader

    downloader.MAX_RETRIES = 5  # with TFDS's pauses 6 seconds; its own 10 take 3 minutes to find that one is offline
    if not sys.stderr.isatty():
        tensorflow_datasets.disable_progress_bar()
    config = tensorflow_datasets.download.DownloadConfig(extract_dir=downloads / "extracted")  # not shared between sets
    try:
        find_builder(name, data_dir).download_and_prepare(download_config=config)
    except Exception as error:  # TFDS fails in every way a network, an archive and a disk can
        sender.send(textwrap.shorten(str(error), 300, placeholder=" ...") or type(error).__name__)
    else:
        sender.send(None)


@contextlib.contextmanager
def _nothing_half_done(folders: list[pathlib.Path]) -> Iterator[None]:
    """On failure removes what was begun below `folders` meanwhile, and the directories that are left empty."""
    before = {path for folder in folders for path in folder.rglob("*")}
    parents = [path for folder in folders for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    except BaseException:
        new = [path for folder in folders for path in folder.rglob("*") if path not in before]
        for path in filter(_is_partial, new):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        for path in sorted({*new, *parents}, reverse=True):
            with contextlib.suppress(OSError):  # it is a file, or not empty, or gone
                path.rmdir()
        raise


def _is_partial(path: pathlib.Path) -> bool:
    """Whether TFDS names a file or directory so while it is being written, or writes it before it has any data."""
    return path.name.startswith("incomplete.") or ".tmp." in path.name or path.name == ".config"


def main(argv: list[str]) -> None:
    parser = cli.Parser(prog=cli.program("prepare"), description=__doc__.splitlines()[0])
    parser.add_argument("name", metavar="NAME", help="such as cifar100, cifar10, mnist, fashion_mnist, imagenet2012")
    parser.add_argument(
        "--data_dir", default="", help="default: $TFDS_DATA_DIR or ~/tensorflow_datasets, as TFDS has it"
    )
    flags = parser.parse_args(argv)
    place, prepared_now = prepare(flags.name, os.path.expanduser(flags.data_dir))
    print(f"{flags.name} {'is now' if prepared_now else 'was already'} prepared in {place}")


if __name__ == "__main__":
    sys.exit(cli.run(main))
