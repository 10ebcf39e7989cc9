"""Errors that the command prints as one message: what the user has to fix, and what stopped a run."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

Built = TypeVar("Built", bound=Callable[..., Any])


class ConfigError(ValueError):
    """A configuration or data error; the command prints it as one message and exits with status 2.

    Args:
        key: the configuration key as typed on the command line, e.g. ``scenario.num_tasks``.
        expected: which values are right.
        got: the value that was given.
        fix: what the user can do, as an imperative sentence.
    """

    def __init__(self, key: str, *, expected: str, got: object, fix: str) -> None:
        self.key, self.expected, self.got, self.fix = key, expected, got, fix
        super().__init__(key, expected, got, fix)

    def __reduce__(self) -> tuple:
        return _rebuild, (type(self), self.key, self.expected, self.got, self.fix)

    def __str__(self) -> str:
        got = self.got if isinstance(self.got, str) else repr(self.got)
        return f"{self.key}: expected {self.expected}; got {got}. {self.fix}"

    def under(self, prefix: str) -> "ConfigError":
        """The same error with the key ``prefix.key`` (a component knows its keys, not the name of its group)."""
        return type(self)(f"{prefix}.{self.key}", expected=self.expected, got=self.got, fix=self.fix)


class RunError(RuntimeError):
    """What stopped a run whose configuration is right; the command prints it as one message and exits with status 1."""


def _rebuild(cls: type[ConfigError], key: str, expected: str, got: object, fix: str) -> ConfigError:
    return cls(key, expected=expected, got=got, fix=fix)


def find_config_error(error: BaseException | None) -> ConfigError | None:
    """The first :class:`ConfigError` among ``error`` and its causes; OmegaConf wraps one that a resolver raises."""
    while error is not None and not isinstance(error, ConfigError):
        error = error.__cause__ or error.__context__
    return error


def require(condition: bool, key: str, *, expected: str, got: object, fix: str) -> None:
    """Raise :class:`ConfigError` unless ``condition`` holds."""
    if not condition:
        raise ConfigError(key, expected=expected, got=got, fix=fix)


Checked = float | Sequence[float] | None
"""A number, a list of numbers, or null where the setting may be null: null is never refused."""


def require_positive(*, fix: str, **values: Checked) -> None:
    """Raise :class:`ConfigError` for the first of ``values`` that is not above 0; its name is the key."""
    _require_each(values, lambda number: number > 0, "a number above 0", fix)


def require_nonnegative(*, fix: str, **values: Checked) -> None:
    """Raise :class:`ConfigError` for the first of ``values`` that is below 0; its name is the key."""
    _require_each(values, lambda number: number >= 0, "0 or more", fix)


def require_fraction(*, fix: str, below_one: bool = False, **values: Checked) -> None:
    """Raise :class:`ConfigError` for the first of ``values`` outside [0, 1]; its name is the key.

    Args:
        fix: what the user can do.
        below_one: refuse 1 as well.
    """
    if below_one:
        _require_each(values, lambda number: 0 <= number < 1, "a number in [0, 1)", fix)
    else:
        _require_each(values, lambda number: 0 <= number <= 1, "a number in [0, 1]", fix)


def _require_each(values: Mapping[str, Checked], holds: Callable[[float], bool], expected: str, fix: str) -> None:
    for key, value in values.items():
        if isinstance(value, Sequence):
            require(all(map(holds, value)), key, expected=f"for each entry {expected}", got=list(value), fix=fix)
        elif value is not None:
            require(holds(value), key, expected=expected, got=value, fix=fix)


class Void(NamedTuple):
    """An argument that has no effect, when, and why."""

    argument: str
    when: Callable[[Mapping[str, Any]], bool]
    why: str


def void(*names: str, when: Callable[[Mapping[str, Any]], bool], why: str) -> Callable[[Built], Built]:
    """Declare that some arguments of a class or function have no effect for certain values of the others.

    A user who sets one of them then gets an error: the run would not be what its command line says.

    Args:
        names: the arguments.
        when: all configured arguments by name, and the whole configuration as ``config`` -> whether these have no
            effect.
        why: the end of the sentence "expected no value, since ...".
    """

    def declare(built: Built) -> Built:
        unknown = set(names) - set(inspect.signature(built).parameters)
        assert not unknown, f"{built} has no argument {unknown}"
        own = [*vars(built).get("void", ()), *(Void(name, when, why) for name in names)]  # not those of a base class
        built.void = own  # type: ignore[attr-defined]
        return built

    return declare
