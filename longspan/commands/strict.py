"""Commands that take no option twice, unless it is one that collects values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperCommand

from longspan.commands.run_app import UsageError


class StrictCommand(TyperCommand):
    """A command that refuses a second value for one option; click would forget the first."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse. Raises `UsageError` for an option that is given twice."""
        if not ctx.resilient_parsing:
            _, _, order = self.make_parser(ctx).parse_args(args=list(args))
            for index, parameter in enumerate(order):
                if parameter in order[:index] and not self._collects(parameter):
                    raise UsageError(f"{parameter.opts[0]} is given twice; give it once")
        return super().parse_args(ctx, args)

    def _collects(self, parameter: Any) -> bool:
        return bool(parameter.multiple or getattr(parameter, "count", False)
                    or parameter.nargs != 1 or parameter.param_type_name == "argument")


class Commands(typer.Typer):
    """A `typer.Typer` whose commands are strict."""

    def command(self, *args: Any, **options: Any) -> Callable[[Any], Any]:
        """Register a command as typer does."""
        return super().command(*args, **{"cls": StrictCommand, **options})
