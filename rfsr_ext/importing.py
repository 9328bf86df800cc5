"""What users name: objects of their own code, ``package.module:Name``, words that are nearly right, packages."""

import difflib
import importlib
import re
from collections.abc import Iterable
from typing import Any

__all__ = ["create_object", "did_you_mean", "import_object", "is_import_name", "require"]


def is_import_name(name: str) -> bool:
    """Whether ``name`` has the form ``package.module:Name``."""
    return re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*", name) is not None


def import_object(name: str, what: str) -> Any:
    """Import the callable that ``package.module:Name`` (or ``package.module:Class.method``) names.

    Args:
        name: as above; the module must be importable, so its folder must be on ``PYTHONPATH`` or be the one where
            ``rfsr`` was started.
        what: what it stands for, such as "model", for the sentence of an error.

    Raises:
        ValueError: if the name has another form, the module cannot be imported, or it holds no such callable.
    """
    if not is_import_name(name):
        raise ValueError(f"{what} must have the form package.module:Name, got {name!r}")
    module, _, path = name.partition(":")
    try:
        found = importlib.import_module(module)
    except Exception as error:  # whatever the user's code raises while it is imported
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{what} {name!r} must name a module that can be imported, got {type(error).__name__}: {reason}; "
            f"is its folder on PYTHONPATH?"
        ) from error
    for part in path.split("."):
        if not hasattr(found, part):
            raise ValueError(f"{what} {name!r} must name something in {module!r}, which has no {path!r}")
        found = getattr(found, part)
    if not callable(found):
        raise ValueError(f"{what} {name!r} must name something to call, got a {type(found).__name__}")
    return found


def create_object(name: str, what: str, kind: type, *arguments: Any, **options: Any) -> Any:
    """Call what ``package.module:Name`` names with ``arguments`` and ``options`` and return the ``kind`` it makes.

    Raises:
        ValueError: see `import_object`; or if it returns something else.
    """
    made = import_object(name, what)(*arguments, **options)
    if not isinstance(made, kind):
        raise ValueError(
            f"{what} {name!r} must return an instance of {kind.__name__}, got one of {type(made).__name__}"
        )
    return made


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a sentence about a word that is not known: the nearest one that is, or nothing if none is near."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {close[0]!r}?" if close else ""


def require(package: str, what: str, install: str) -> None:
    """Refuse a setting whose package is not installed.

    Args:
        package: its name in an import.
        what: the setting, such as "lora_rank".
        install: the end of the sentence, what to do.

    Raises:
        ModuleNotFoundError: if it cannot be imported.
    """
    try:
        importlib.import_module(package)
    except ImportError:
        raise ModuleNotFoundError(f"{what} needs the package {package}; {install}") from None
