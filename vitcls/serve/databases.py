"""Where receipts and feedback are: in the workdir unless told otherwise; and which of them this machine has served."""

import pathlib

from vitcls.core.cache import cache_dir

_KNOWN = "databases.txt"  # in the cache directory, a path in each line


def of_workdir(workdir: pathlib.Path) -> pathlib.Path:
    return workdir / "feedback.db"


def url(file: pathlib.Path) -> str:
    return f"sqlite:///{file.absolute()}"


def remember(database: str) -> None:
    """Lets `vitcls replay ID` find the receipts in a file without being told; URLs with passwords are not kept."""
    import sqlalchemy

    address = sqlalchemy.make_url(database)
    if address.get_backend_name() != "sqlite" or not address.database:
        return
    file = pathlib.Path(address.database).absolute()
    if url(file) not in known():
        with open(cache_dir() / _KNOWN, "a", encoding="utf-8") as known_files:
            known_files.write(f"{file}\n")


def known() -> list[str]:
    """URLs of those that are still there, the newest first."""
    try:
        lines = (cache_dir() / _KNOWN).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    newest_first = dict.fromkeys(pathlib.Path(line) for line in reversed(lines))
    return [url(file) for file in newest_first if file.exists()]
