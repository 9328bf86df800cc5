"""Networks of diffusers with an option of their own in ``config.json``."""

import inspect
from collections.abc import Callable
from typing import Any

from diffusers.configuration_utils import register_to_config

__all__ = ["with_options"]


def with_options(kind: type, **options: Any) -> Callable:
    """``__init__`` of a subclass of a diffusers model that takes ``options`` too; config.json keeps them all.

    diffusers reads the names of a configuration off the signature, so that must name those of ``kind`` as well.
    """
    theirs = inspect.signature(kind.__init__)
    ours = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=value) for name, value in options.items()]

    def decorate(init: Callable) -> Callable:
        init.__signature__ = theirs.replace(parameters=[*theirs.parameters.values(), *ours])
        return register_to_config(init)

    return decorate
