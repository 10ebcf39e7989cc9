"""Checks of values: what they refuse, and what the message says."""

import math

import pytest

from cl_bench.core.errors import (
    ConfigError,
    find_config_error,
    require_fraction,
    require_nonnegative,
    require_positive,
)


@pytest.mark.parametrize(
    ("check", "good", "bad", "message"),
    [
        (require_positive, 0.5, 0, "rate: expected a number above 0; got 0. Fix it."),
        (require_positive, None, math.nan, "rate: expected a number above 0; got nan. Fix it."),
        (require_positive, [1, 2], [1, 0], "rate: expected for each entry a number above 0; got [1, 0]. Fix it."),
        (require_nonnegative, 0, -1, "rate: expected 0 or more; got -1. Fix it."),
        (require_nonnegative, [], [-0.1], "rate: expected for each entry 0 or more; got [-0.1]. Fix it."),
        (require_fraction, 1.0, 1.1, "rate: expected a number in [0, 1]; got 1.1. Fix it."),
        (require_fraction, 0.0, -0.1, "rate: expected a number in [0, 1]; got -0.1. Fix it."),
    ],
)
def test_a_check_names_key_range_value_and_fix(check, good, bad, message):
    check(fix="Fix it.", rate=good)
    with pytest.raises(ConfigError) as error:
        check(fix="Fix it.", other=good, rate=bad)
    assert str(error.value) == message


def test_a_fraction_below_one_is_not_one():
    require_fraction(fix="Fix it.", below_one=True, rate=0.99)
    with pytest.raises(ConfigError, match=r"rate: expected a number in \[0, 1\); got 1"):
        require_fraction(fix="Fix it.", below_one=True, rate=1)


def test_the_config_error_behind_another_error_is_found():
    cause = ConfigError("rate", expected="0 or more", got=-1, fix="Fix it.")
    outer = KeyError("rate")
    outer.__cause__ = cause
    assert find_config_error(outer) is cause
    assert find_config_error(KeyError("rate")) is None
