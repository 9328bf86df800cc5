"""The parts of a diffusers folder, opened strictly: nothing is downloaded, and every weight is accounted for."""

import contextlib
import inspect
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.utils import logging as diffusers_logging
from torch import nn
from transformers.utils import logging as transformers_logging

from rfsr_ext.files import decode_text, replace_folder
from rfsr_ext.memory import check_opened
from rfsr_ext.weights.reading import differences, reason

__all__ = [
    "ISR_CONFIG",
    "open_part",
    "open_plain_part",
    "quiet",
    "read_config",
    "read_index",
    "read_json",
    "require_classes",
    "write_folder",
]

ISR_CONFIG = "isr_config.json"
"""The file in a model's folder that holds what diffusers has no place for."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no advice of the libraries while a folder is opened or written."""
    shown = [log for log in (diffusers_logging, transformers_logging) if log.is_progress_bar_enabled()]
    levels = [(log, log.get_verbosity()) for log in (diffusers_logging, transformers_logging)]
    for log, _ in levels:
        log.set_verbosity_error()
    for log in shown:
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log in shown:
            log.enable_progress_bar()
        for log, level in levels:
            log.set_verbosity(level)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is none.
    """
    try:
        found = json.loads(decode_text(path.read_bytes()))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is not valid JSON ({error}); the file is damaged, fetch it again") from None
    if not isinstance(found, dict):
        raise ValueError(f"{str(path)!r} must hold a JSON object, got a {type(found).__name__}; fetch it again")
    return found


def read_config(path: Path, kind: type) -> dict[str, Any]:
    """What stands in a folder's `ISR_CONFIG`: arguments of ``kind``, the recipe as a mapping; nothing if it has none.

    Raises:
        ValueError: if the file is damaged or has a key that ``kind`` does not take.
    """
    config = path / ISR_CONFIG
    stored = read_json(config) if config.is_file() else {}
    stored.pop("model", None)  # the kind
    known = {name for base in kind.__mro__ for name in inspect.signature(base.__init__).parameters}
    for key in stored:
        if key not in known:
            raise ValueError(f"{str(config)!r} has an unknown key {key!r}, which {kind.__name__} does not take")
    if not isinstance(stored.get("recipe") or {}, dict):
        raise ValueError(f"recipe in {str(config)!r} must be an object, got {stored['recipe']!r}")
    return stored


def read_index(path: Path) -> dict[str, str | None]:
    """The class of each part of a diffusers folder, by name; that of its pipeline as ``_class_name``.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if it is none of diffusers.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"model folder {str(path)!r} does not exist; give a folder on disk or one of list_models()"
        )
    index = path / "model_index.json"
    if not index.is_file():
        what = "a file" if path.is_file() else "a folder without model_index.json"
        inside = path / "model" / index.name  # as in the folder of a training run
        advice = f"; did you mean {str(inside.parent)!r}?" if inside.is_file() else ""
        raise ValueError(
            f"model must be a diffusers folder (model_index.json, unet/, controlnet/ …), got {what}: {str(path)!r}"
            f"{advice}"
        )
    entries = read_json(index)
    classes = {name: value[1] for name, value in entries.items() if isinstance(value, list) and len(value) == 2}
    return {"_class_name": entries.get("_class_name"), **classes}


def require_classes(path: Path, classes: Mapping[str, type], advice: str) -> None:
    """Refuse a folder whose parts are of other classes; ``advice`` ends the sentence.

    Raises:
        FileNotFoundError, ValueError: as `read_index` does; or naming the first such part.
    """
    found = read_index(path)
    for name, kind in classes.items():
        if found.get(name) != kind.__name__:
            raise ValueError(f"{name} in {str(path)!r} must be a {kind.__name__}, got {found.get(name)}; {advice}")


def open_part(
    kind: type, folder: str | Path, dtype: torch.dtype = torch.float32, name: str | None = None, **options: Any
) -> nn.Module:
    """A network from its folder (``config.json`` and weights), by diffusers or transformers, in ``dtype``.

    A folder that holds only half-precision files (``*.fp16.safetensors``) is opened as well.  Weights go from the file
    into their places one by one; they are never there twice.  ``name`` is what an error calls the part; ``options`` are
    for the class.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if the files are damaged, or lack weights, or have weights that the network does not know.
        MemoryError: if there is too little for it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{name or folder.name} folder {str(folder)!r} does not exist; give a complete model folder"
        )
    files = [file.name for file in folder.iterdir()]
    halves = [name for name in files if ".fp16." in name]
    whole = [name for name in files if name.endswith((".safetensors", ".bin")) and name not in halves]
    options |= {"variant": "fp16"} if halves and not whole else {}
    # diffusers calls it torch_dtype and may change its mind; transformers has changed to dtype
    options |= {"dtype": dtype} if kind.__module__.startswith("transformers") else {"torch_dtype": dtype}
    try:
        with quiet():
            network, report = kind.from_pretrained(  # pyrefly: ignore[missing-attribute]
                folder, local_files_only=True, output_loading_info=True, **options
            )
    except Exception as error:
        check_opened(error, folder)
        raise ValueError(
            f"{str(folder)!r} cannot be opened as {kind.__name__} ({reason(error, 300)}); the files are damaged or of "
            "another model, fetch them again"
        ) from error
    missing, strange = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    if missing or strange:
        found = differences(missing, strange, "weights")
        raise ValueError(f"{str(folder)!r} is no {kind.__name__} of its config.json: {found}")
    if mismatched := report.get("mismatched_keys"):
        name, given, wanted = sorted(mismatched)[0]
        raise ValueError(
            f"{str(folder)!r} is no {kind.__name__} of its config.json: {name} must have shape {list(wanted)}, got "
            f"{list(given)}"
        )
    return network


def write_folder(path: str | Path, pipeline: str, parts: dict[str, Any], others: dict[str, Any], config: dict) -> None:
    """Write a folder that the pipeline of that name opens, with ``config`` in `ISR_CONFIG`: complete or not at all.

    What else lies in the folder stays (see `rfsr_ext.files.replace_folder`).

    Args:
        path: the folder.
        pipeline: the class of diffusers.
        parts: networks, tokenizers and scheduler by name.
        others: further entries of ``model_index.json``, such as parts that are absent.
        config: what diffusers has no place for.
    """
    index: dict[str, Any] = {"_class_name": pipeline, "_diffusers_version": diffusers.__version__}
    for name, part in parts.items():
        index[name] = [type(part).__module__.partition(".")[0], type(part).__name__]
    with replace_folder(path) as folder, quiet():
        for name, part in parts.items():
            part.save_pretrained(folder / name)
        for name, values in (("model_index.json", index | others), (ISR_CONFIG, config)):
            (folder / name).write_text(
                json.dumps(values, indent=2, sort_keys=name != ISR_CONFIG) + "\n", encoding="utf-8"
            )


def open_plain_part(kind: type, folder: Path) -> Any:
    """A part without weights, a tokenizer or a scheduler, from its folder.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if its files are missing or damaged.
        MemoryError: if there is too little for it.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder.name} folder {str(folder)!r} does not exist; give a complete model folder")
    try:
        return kind.from_pretrained(folder, local_files_only=True)  # pyrefly: ignore[missing-attribute]
    except Exception as error:
        check_opened(error, folder)
        why = reason(error, 300)
        raise ValueError(f"{str(folder)!r} cannot be opened as {kind.__name__} ({why}); fetch it again") from error
