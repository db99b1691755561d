"""How much memory of the host this process may use."""

import contextlib
import os
import pathlib
from collections.abc import Iterator

# By the controller that a line of /proc/self/cgroup names, '' for version 2: where its groups are, and their limit.
_CGROUPS = {"": ("sys/fs/cgroup", "memory.max"), "memory": ("sys/fs/cgroup/memory", "memory.limit_in_bytes")}


def host_memory_bytes(root: os.PathLike | str = "/") -> int:
    """Bytes of memory: the machine's, or less where a cgroup (version 1 or 2) limits it, as in a container or a job.

    `root` is where /proc and /sys are.
    """
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([physical, *_cgroup_limits(pathlib.Path(root))])


def _cgroup_limits(root: pathlib.Path) -> Iterator[int]:
    """The limits of this process's group and of all the groups around it."""
    own = dict.fromkeys(_CGROUPS, "/")  # as a container sees it that does not see the groups outside
    with contextlib.suppress(OSError, ValueError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            own |= dict.fromkeys(controllers.split(","), path)
    for controller, (mount, file) in _CGROUPS.items():
        group = pathlib.PurePosixPath(own[controller])
        for part in (group, *group.parents):
            with contextlib.suppress(OSError, ValueError):  # not there, or 'max'
                yield int((root / mount / str(part).lstrip("/") / file).read_text())
