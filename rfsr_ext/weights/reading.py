"""Weight files of other people's models, read without running code that is in them."""

import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

__all__ = ["load_strictly", "read_tensors"]


def read_tensors(path: Path, what: str) -> dict[str, Tensor]:
    """Tensors by name from a safetensors file, a TorchScript archive or what ``torch.save`` made of a state dict.

    A lone tensor, such as learned prompts, comes back under the empty name.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged or holds something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{what} {str(path)!r} does not exist")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found = _read_torch(path)
    except Exception as error:
        reason = " ".join(str(error).split()).split(". ")[0]
        raise ValueError(
            f"{what} {str(path)!r} cannot be read ({reason}); the file is damaged or something else, fetch it again"
        ) from error
    if isinstance(found, Tensor):
        return {"": found}
    if isinstance(found, dict) and set(found) in ({"params"}, {"state_dict"}, {"model"}):
        (found,) = found.values()
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"{what} {str(path)!r} must hold tensors by name, got a {type(found).__name__}")
    return {name.removeprefix("module."): value for name, value in found.items()}


def _read_torch(path: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer releases of torch call TorchScript deprecated; OpenAI's files are that
        try:
            return dict(torch.jit.load(path, map_location="cpu").state_dict())
        except RuntimeError:  # no TorchScript archive
            return torch.load(path, map_location="cpu", weights_only=True)


def load_strictly(module: nn.Module, tensors: dict[str, Tensor], path: Path, what: str, assign: bool = False) -> None:
    """``load_state_dict`` whose complaint is one sentence; ``assign`` takes the tensors over instead of copying them.

    Raises:
        ValueError: if names or shapes are not those of the module.
    """
    wanted = module.state_dict()
    missing = [name for name in wanted if name not in tensors]
    strange = [name for name in tensors if name not in wanted]
    if missing or strange:
        lacks = f"lacks {len(missing)} tensors such as {missing[0]}" if missing else "lacks none"
        more = f"has {len(strange)} unknown ones such as {strange[0]}" if strange else "has no unknown ones"
        raise ValueError(f"{str(path)!r} is not {what}: it {lacks} and {more}")
    for name, tensor in wanted.items():
        if tensors[name].shape != tensor.shape:
            raise ValueError(
                f"{str(path)!r} is not {what} of this architecture: {name} must have shape {list(tensor.shape)}, "
                f"got {list(tensors[name].shape)}"
            )
    module.load_state_dict(tensors, assign=assign)
