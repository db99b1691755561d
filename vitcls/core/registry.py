"""Named choices of one kind: a name stands for a frozen dataclass, and its fields are keys of the config.

A class checks its fields in `__post_init__` with `require`, and raises ValueError in its own words. The registry says
which key of the config it is about. Modules are imported when their entry is asked for.
"""

import contextlib
import dataclasses
import importlib
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from vitcls.core import durations, errors
from vitcls.core.errors import UserError

_LARGEST = 2**31  # examples of a batch


class Registry(Mapping[str, Any]):
    """name -> dataclass, for the block `key` of a config. The registry of models has presets of their modules."""

    def __init__(
        self,
        key: str,
        entries: Mapping[str, str],
        *,
        shared: type | None = None,
        separate: bool = False,
        check: Callable[[Any], None] = lambda entry: None,
    ):
        """`entries`: name -> 'module:Class'.

        `shared` is a dataclass of the keys that the block has whatever the name; with `separate` a block has the keys
        of its own entry alone. `check` raises ValueError for what no entry may have.
        """
        self.key = key
        self.shared = shared
        self._separate = separate
        self._check = check
        self._entries: dict[str, Any] = dict(entries)

    def add(self, name: str, entry: type) -> None:
        """Adds a dataclass from elsewhere, under a new name or the one that it has already.

        Raises ValueError for what is no dataclass with a default for every field, for a name that another has, and for
        a field that means something else in the block.
        """
        frozen = dataclasses.is_dataclass(entry) and entry.__dataclass_params__.frozen
        if not frozen or dataclasses.MISSING in defaults(entry).values():
            raise ValueError(f"{entry!r} must be a frozen dataclass, each field with a plain default (no factory)")
        other = self._entries.get(name, entry)
        if getattr(other, "__qualname__", other) != entry.__qualname__:
            raise ValueError(f"{self.key}.name='{name}' is taken by {other}")
        fixed = {"name"} | set(defaults(self.shared) if self.shared else ())
        others = [] if self._separate else [self[each] for each in self if each != name]
        there = {field: default for each in others for field, default in defaults(each).items()}
        for field, default in defaults(entry).items():
            if field in fixed:
                raise ValueError(f"the field '{field}' of {entry.__name__} is a key of {self.key} already; rename it")
            if there.get(field, default) != default:
                raise ValueError(
                    f"the field '{field}' of {entry.__name__} is a key of {self.key} already, whose default is "
                    f"{there[field]!r}: take that default, or rename it"
                )
        self._entries[name] = entry

    def __getitem__(self, name: str) -> type:
        """The class `name`; raises UserError with the nearest name where there is none."""
        if name not in self:
            raise errors.unknown(f"{self.key}.name", name, self._entries)
        entry = self._entries[name]
        if not isinstance(entry, str):
            return entry
        module, _, attribute = entry.partition(":")
        return getattr(importlib.import_module(module), attribute)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def block(self, name: str) -> dict[str, Any]:
        """The block of a config with the name `name`: its shared keys, and the fields of all entries.

        Fields of one name mean the same in every entry that has them.
        """
        block = {"name": name} | (defaults(self.shared) if self.shared else {})
        for entry in self.values():
            block |= defaults(entry)
        return block

    def create(self, name: str, values: Mapping[str, Any], *, key: str = "") -> Any:
        """The dataclass `name` with its fields from `values`; extra values are ignored. UserError names the key."""
        return fill(self[name], values, key or self.key, check=self._check)

    def about(self, name: str) -> contextlib.AbstractContextManager[None]:
        """A context in which a ValueError of the entry `name` becomes a UserError that names the key."""
        return about(self.key, defaults(self[name]) | (defaults(self.shared) if self.shared else {}))

    def check(self, values: Mapping[str, Any], name: str = "") -> Any:
        """The dataclass `name`, or that which the block names; raises UserError for it or a shared key."""
        if self.shared:
            fill(self.shared, values, self.key)
        return self.create(name or values["name"], values)


def defaults(entry: type) -> dict[str, Any]:
    """The fields of a dataclass with their defaults."""
    return {field.name: field.default for field in dataclasses.fields(entry)}


def local_path() -> Any:
    """A field that is a path on this machine: made absolute, and free to change when a run goes on."""
    return dataclasses.field(default="", metadata={"path": True})


def paths(entry: type) -> set[str]:
    """The fields that are `local_path`s."""
    return {field.name for field in dataclasses.fields(entry) if field.metadata.get("path")}


def of_two_types(entry: type) -> set[str]:
    """The fields whose values may have one of several types, as `int | tuple`; the dataclass checks them itself."""
    return {field.name for field in dataclasses.fields(entry) if not isinstance(field.type, type)}


def fill(entry: type, values: Mapping[str, Any], key: str, *, check: Callable[[Any], None] = lambda entry: None) -> Any:
    """The dataclass `entry` with its fields from `values`; extra values are ignored. UserError names `key`."""
    fields, free = defaults(entry), of_two_types(entry)
    given = {
        field: checked(values[field], None if field in free else default, f"{key}.{field}")
        for field, default in fields.items()
        if field in values
    }
    with about(key, fields):
        made = entry(**given)
        check(made)
        return made


@contextlib.contextmanager
def about(key: str, fields: Mapping[str, Any]) -> Iterator[None]:
    """Turns a ValueError of an entry, in its own words, into a UserError that names the key."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(_with_key(str(error), key, fields)) from None


def _with_key(message: str, key: str, fields: Mapping[str, Any]) -> str:
    """'padding=-1 is impossible' -> 'config.augment.crop.padding=-1 is impossible'."""
    field = re.match(r"(\w+)(?:[=:]| ')", message)
    return f"{key}.{message}" if field and field[1] in fields else f"{key}: {message}"


def require(entry: Any, field: str, condition: bool, expected: str) -> None:
    """Raises ValueError, 'FIELD=VALUE is impossible; it must be EXPECTED', unless `condition` holds."""
    if not condition:
        raise ValueError(f"{field}={getattr(entry, field)!r} is impossible; it must be {expected}")


def require_range(entry: Any, **bounds: tuple[float, float]) -> None:
    """Raises ValueError unless each field is within its (lowest, highest), the latter perhaps infinite."""
    for field, (low, high) in bounds.items():
        expected = f"at least {low}" if high == math.inf else f"in [{low}, {high}]"
        require(entry, field, low <= getattr(entry, field) <= high, expected)


def require_durations(entry: Any, *fields: str) -> None:
    """Raises ValueError unless each field is a duration or a tuple of such.

    How many steps some examples are is not known here: that depends on the batch.
    """
    for field in fields:
        value = getattr(entry, field)
        for duration in value if isinstance(value, tuple) else (value,):
            try:
                durations.to_steps(duration, batch_size=_LARGEST, num_examples=_LARGEST, total_steps=1)
            except UserError as error:
                raise ValueError(f"{field}: {error}") from None


def require_choice(entry: Any, field: str, valid: tuple[str, ...]) -> None:
    """Raises ValueError with the nearest name unless the value of `field` is one of `valid`."""
    value = getattr(entry, field)
    if value not in valid:
        raise ValueError(errors.not_known(field, str(value), valid))


_TYPES = {
    bool: ("True or False", (bool,)),
    int: ("a whole number", (int,)),
    float: ("a number that float32 can hold", (int, float)),
    str: ("text", (str,)),
    tuple: ("a tuple", (tuple, list)),
}


def checked(value: Any, default: Any, key: str) -> Any:
    """`value` if it is of the type of `default`, or can be. A default of None takes anything.

    Raises UserError, naming `key`. A number must keep its meaning in float32: finite there, and not 0 unless it is.
    """
    if default is None:
        return value
    expected, types = _TYPES[type(default)]
    wrong = not isinstance(value, types) or (isinstance(value, bool) and bool not in types)
    if wrong or (isinstance(default, float) and not _fits_float32(value)):
        raise UserError(f"{key}={value!r} is impossible; it must be {expected}, such as {default!r}")
    if isinstance(default, float):
        return float(value)
    return tuple(value) if isinstance(value, list) else value


def _fits_float32(value: float) -> bool:
    return math.isfinite(value) and (value == 0 or 1e-37 <= abs(value) <= 1e37)
