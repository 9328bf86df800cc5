"""Numbers of the command line: each has its range and is checked when it is read, before anything is loaded."""

import math
from collections.abc import Callable
from typing import Any

import typer

__all__ = ["SEED", "real", "whole"]

SEED = 2**32 - 1  # the largest seed, as in a configuration


def whole(help_: str, low: int, high: int = 10**9, step: int = 1, name: str | None = None) -> Any:
    """An option that takes a whole number from ``low`` to ``high``, a multiple of ``step``; called as its parameter."""
    wanted = f"a whole number from {low} to {high}" + (f", a multiple of {step}" if step > 1 else "")
    return _option(help_, "<int>", int, lambda number: low <= number <= high and number % step == 0, wanted, name)


def real(help_: str, above: float, high: float) -> Any:
    """An option that takes a finite number above ``above`` and at most ``high``."""
    wanted = f"a number above {above:g} and at most {high:g}"
    return _option(help_, "<float>", float, lambda number: above < number <= high, wanted)


def _option(
    help_: str, metavar: str, kind: type, fits: Callable[[Any], bool], wanted: str, name: str | None = None
) -> Any:
    def check(parameter: typer.CallbackParam, text: str | None) -> Any:
        if text is None:
            return None
        try:
            number = kind(text)
        except ValueError:
            number = math.nan
        if not fits(number):
            raise ValueError(f"{parameter.opts[0]} must be {wanted}, got {text[:40]!r}")
        return number

    # parsed as text, because typer's own words for what is no number are neither a sentence nor ours
    names = () if name is None else (name,)
    return typer.Option(*names, help=help_, metavar=metavar, parser=str, callback=check)
