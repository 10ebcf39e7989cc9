"""The errors that are told in one message: what the user has to mend, and what stopped a run."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

Built = TypeVar("Built", bound=Callable[..., Any])


class ConfigError(ValueError):
    """A configuration or data error; the command prints it as one message and exits with status 2.

    Args:
        key: the configuration key as typed on the command line, e.g. ``scenario.num_tasks``.
        expected: what would have been right.
        got: what came.
        fix: the way out, as an imperative sentence.
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
        """The same error with its key placed below ``prefix`` (a component knows its keys, not its group)."""
        return type(self)(f"{prefix}.{self.key}", expected=self.expected, got=self.got, fix=self.fix)


class RunError(RuntimeError):
    """What stopped a run that is configured rightly; the command prints it as one message and exits with status 1."""


def _rebuild(cls: type[ConfigError], key: str, expected: str, got: object, fix: str) -> ConfigError:
    return cls(key, expected=expected, got=got, fix=fix)


def within(error: BaseException | None) -> ConfigError | None:
    """The :class:`ConfigError` that ``error`` was raised because of, e.g. that of a resolver inside OmegaConf's own."""
    while error is not None and not isinstance(error, ConfigError):
        error = error.__cause__ or error.__context__
    return error


def require(condition: bool, key: str, *, expected: str, got: object, fix: str) -> None:
    """Raise :class:`ConfigError` unless ``condition`` holds."""
    if not condition:
        raise ConfigError(key, expected=expected, got=got, fix=fix)


class Void(NamedTuple):
    """When an argument does nothing, and why."""

    argument: str
    when: Callable[[Mapping[str, Any]], bool]
    why: str


def void(*names: str, when: Callable[[Mapping[str, Any]], bool], why: str) -> Callable[[Built], Built]:
    """Declare of a class or function that arguments do nothing where others have certain values.

    Whoever types one of them there is told so: the run would not be what its command line says.

    Args:
        names: the arguments.
        when: all configured arguments by name, and the whole configuration as ``config`` -> whether these do nothing.
        why: the end of the sentence "expected no value, since ...".
    """

    def declare(built: Built) -> Built:
        unknown = set(names) - set(inspect.signature(built).parameters)
        assert not unknown, f"{built} has no argument {unknown}"
        own = [*vars(built).get("void", ()), *(Void(name, when, why) for name in names)]  # not those of a base class
        built.void = own  # type: ignore[attr-defined]
        return built

    return declare
