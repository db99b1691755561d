import pytest

from vitcls.core import durations
from vitcls.core.errors import UserError


@pytest.mark.parametrize(
    ("duration", "steps"),
    [
        ("400 steps", 400),
        ("1 step", 1),
        ("1_000 steps", 1000),
        ("1e3 steps", 1000),
        ("1.5 steps", 2),
        (".5 steps", 1),
        ("2. steps", 2),
        ("  7   Steps ", 7),
        ("7steps", 7),
        ("+7 steps", 7),
        ("200 epochs", 2060),  # 1030 / 100 steps in an epoch
        ("1 epoch", 11),
        ("0.5 epochs", 6),
        ("1e6 examples", 10_000),
        ("1e6examples", 10_000),
        ("1 example", 1),
        ("101 examples", 2),
        ("1E+2 examples", 1),
        ("5%", 50),
        ("5 %", 50),
        ("0.01%", 1),
        ("100%", 1000),
        ("0 steps", 0),
        ("0 epochs", 0),
        ("0.0 examples", 0),
        ("-0 steps", 0),
        ("0%", 0),
        ("1e-300 epochs", 1),
    ],
)
def test_counts_steps_rounded_up(duration, steps):
    assert durations.to_steps(duration, batch_size=100, num_examples=1030, total_steps=1000) == steps


@pytest.mark.parametrize("percent", [1, 7, 10, 29, 55, 57, 70])
def test_exact_shares_are_not_rounded_up_by_float_noise(percent):
    for total_steps in range(0, 1000, 7):
        steps = durations.to_steps(f"{percent}%", batch_size=1, num_examples=1, total_steps=total_steps)
        assert steps == -(-percent * total_steps // 100)


def test_decimal_fractions_of_an_epoch_are_exact():
    for tenths in range(1, 60):  # 0.1 * 3 > 0.3 in floats
        steps = durations.to_steps(f"{tenths / 10} epochs", batch_size=10, num_examples=1000)
        assert steps == 10 * tenths


@pytest.mark.parametrize(
    ("duration", "message"),
    [
        ("-1 steps", "'-1 steps' is impossible; its number must be finite and not negative"),
        ("-5%", "not negative"),
        ("nan epochs", "must be finite"),
        ("inf epochs", "must be finite"),
        ("-Infinity steps", "must be finite"),
        ("1e999 steps", "must be finite"),
        ("1e12 steps", "at most 2147483647 steps"),
        ("10 epocs", "duration unit 'epocs' is not known; did you mean 'epochs'?"),
        ("3 exampels", "did you mean 'examples'?"),
        ("3 minutes", "duration unit 'minutes' is not known"),
        ("200", "a duration needs a unit: '200 steps'"),
        ("1e6", "a duration needs a unit"),
        ("", "does not start with a number"),
        ("epochs", "does not start with a number"),
        ("ten epochs", "does not start with a number"),
        ("1__0 steps", "malformed number '1__0'"),
        (200, "a duration is text with a unit"),
        (None, "a duration is text with a unit"),
        (0.5, "a duration is text with a unit"),
    ],
)
def test_says_what_is_wrong(duration, message):
    with pytest.raises(UserError) as caught:
        durations.to_steps(duration, batch_size=100, num_examples=1030, total_steps=1000)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_percentage_needs_the_total():
    with pytest.raises(UserError, match="'5%' is a part of the total"):
        durations.to_steps("5%", batch_size=100, num_examples=1030)
    assert durations.to_steps("5 steps", batch_size=100, num_examples=1030) == 5


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("20 steps", "20steps", True),
        ("1e6 examples", "1_000_000 example", True),
        ("1 steps", "1 epochs", False),
        ("cosine", "cosine", True),
        ("cosine", "linear", False),
        (3, "3 steps", False),
        ((), (), True),
    ],
)
def test_durations_that_say_the_same_are_the_same(a, b, same):
    assert durations.same(a, b) == same
