"""Typed errors. Each message has the path of a value, the value, the rule that it breaks and how to fix it."""

from __future__ import annotations

from typing import Any


class MoecompileError(Exception):
    """Base of all errors that moecompile raises itself; `exit_code` is that of the command line."""

    exit_code = 1
    reported = False  # whether another rank has reported it already


class UserError(MoecompileError):
    """A mistake that the user can correct: one message, exit code 2, no traceback."""

    exit_code = 2


class ConfigError(UserError):
    """A config value that breaks a rule.

    Args:
        path: dotted config path, for example `mesh.ep`.
        value: its value.
        rule: the rule that it breaks, as a sentence without a full stop.
        fix: what to change, as a sentence without a full stop.
    """

    def __init__(self, path: str, value: Any, rule: str, fix: str) -> None:
        self.path, self.value, self.rule, self.fix = path, value, rule, fix
        super().__init__(f"{path}={_shown(value)}: {rule}. {fix}.")

    def __reduce__(self) -> tuple[type[ConfigError], tuple[str, Any, str, str]]:
        return type(self), (self.path, self.value, self.rule, self.fix)


class ArgumentError(ConfigError, TypeError):
    """An argument of the Python API with the wrong type; `path` is its name."""


class PlanError(ConfigError):
    """A plan that is inconsistent, or does not fit the model or the mesh."""


class ChatError(UserError):
    """A chat template cannot render a chat, or does not tell what the assistant wrote. The message says why."""


class CaptureError(UserError):
    """The model could not be run or traced."""


class PassError(MoecompileError):
    """The input or output of a pass violates its contract: a bug in the compiler."""

    def __init__(self, name: str, where: str, rule: str) -> None:
        self.name, self.where, self.rule = name, where, rule
        super().__init__(f"pass {name}, {where or 'the graph'}: {rule}")

    def __reduce__(self) -> tuple[type[PassError], tuple[str, str, str]]:
        return type(self), (self.name, self.where, self.rule)


class VerificationFailed(MoecompileError):
    """N ranks do not compute the same as one process, or an export differs from its model."""

    def __init__(self, recipe: str, checks: list[str]) -> None:
        self.recipe, self.checks = recipe, checks
        super().__init__(f"verification of {recipe} failed: {'; '.join(checks)}")

    def __reduce__(self) -> tuple[type[VerificationFailed], tuple[str, list[str]]]:
        return type(self), (self.recipe, self.checks)


class DoesNotFit(MoecompileError):
    """A plan does not fit, and `task.require_fit` asks for it. The task has printed it."""

    reported = True


class RehearsalDiffers(MoecompileError):
    """A rehearsed program holds or sends something else than its plan says. The task has printed it."""

    reported = True


class UnboundAxisError(MoecompileError):
    """An exchange was run before `shard` bound its mesh axis to a process group."""


class RankFailure(MoecompileError):
    """A rank of a launched job ended with an error."""


def _shown(value: Any) -> str:
    return "null" if value is None else str(value)
