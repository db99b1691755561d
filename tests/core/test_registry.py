import dataclasses

import pytest

from vitcls import config as configs
from vitcls.core.errors import UserError
from vitcls.core.registry import Registry, require
from vitcls.optim import OPTIMIZERS


@dataclasses.dataclass(frozen=True)
class Shared:
    rate: float = 0.5


@dataclasses.dataclass(frozen=True)
class Square:
    side: int = 2

    def __post_init__(self):
        require(self, "side", self.side > 0, "above 0")
        if self.side == 13:
            raise ValueError("nobody wants it")


@dataclasses.dataclass(frozen=True)
class Circle:
    radius: float = 1.0


@pytest.fixture
def shapes():
    registry = Registry("config.shape", {}, shared=Shared)
    registry.add("square", Square)
    registry.add("circle", Circle)
    return registry


def test_a_block_has_the_shared_keys_and_those_of_every_entry(shapes):
    assert shapes.block("circle") == {"name": "circle", "rate": 0.5, "side": 2, "radius": 1.0}
    assert shapes.create("circle", {"name": "circle", "side": 0, "radius": 2}) == Circle(2)  # the other's is not its


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"name": "squar"}, "config.shape.name 'squar' is not known; did you mean 'square'?"),
        ({"name": "square", "side": -1}, "config.shape.side=-1 is impossible; it must be above 0"),
        ({"name": "square", "side": 13}, "config.shape: nobody wants it"),
        ({"name": "square", "side": 1.5}, "config.shape.side=1.5 is impossible; it must be a whole number, such as 2"),
        ({"name": "circle", "radius": float("nan")}, "config.shape.radius=nan is impossible; it must be a number"),
        ({"name": "circle", "rate": "x"}, "config.shape.rate='x' is impossible"),
    ],
)
def test_what_is_impossible_is_said_with_its_key(shapes, values, words):
    with pytest.raises(UserError) as caught:
        shapes.check(values)
    assert str(caught.value).startswith(words)


def test_what_comes_from_elsewhere_changes_nothing_of_the_others(shapes):
    @dataclasses.dataclass(frozen=True)
    class Other:
        side: int = 3

    with pytest.raises(ValueError, match=r"the field 'side' of Other is a key of config.shape already"):
        shapes.add("other", Other)
    with pytest.raises(ValueError, match="'square' is taken by"):
        shapes.add("square", Circle)
    with pytest.raises(ValueError, match="must be a frozen dataclass, each field with a plain default"):
        shapes.add("int", int)
    shapes.add("square", Square)  # a config file may be read twice
    assert shapes.block("square")["side"] == 2

    @dataclasses.dataclass(frozen=True)
    class Mine:
        b1: float = 0.5
        weight_decay: float = 0.0

    with pytest.raises(ValueError, match=r"the field 'b1' of Mine is a key of config.optimizer already"):
        OPTIMIZERS.add("mine", Mine)
    assert configs.default_config("lenet5").optimizer.b1 == 0.9
