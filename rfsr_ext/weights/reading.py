"""Weight files of other people's models, read without running code that is in them."""

import warnings
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from rfsr_ext.memory import check_opened

__all__ = ["differences", "load_strictly", "open_network", "read_tensors", "reason"]

_WRAPPERS = ("state_dict", "params_ema", "params", "model")


def read_tensors(path: Path, what: str) -> dict[str, Tensor]:
    """Tensors by name from a safetensors file, a TorchScript archive or what ``torch.save`` made of a state dict.

    A lone tensor, such as learned prompts, comes back under the empty name.  The tensors lie in the file until they are
    used, so a file larger than the memory can be opened.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged or holds something else.
        MemoryError: if there is too little for it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{what} {str(path)!r} does not exist")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found = _read_torch(path)
    except Exception as error:
        check_opened(error, path)
        raise ValueError(
            f"{what} {str(path)!r} cannot be read ({reason(error)}); the file is damaged or something else, fetch it "
            "again"
        ) from error
    if isinstance(found, Tensor):
        return {"": found}
    if isinstance(found, dict):
        for wrapper in _WRAPPERS:  # beside the weights may stand counters and settings of the training
            if isinstance(found.get(wrapper), dict):
                found = found[wrapper]
                break
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"{what} {str(path)!r} must hold tensors by name, got a {type(found).__name__}")
    return {name.removeprefix("module."): value for name, value in found.items()}


def _read_torch(path: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer releases of torch call TorchScript deprecated; OpenAI's files are that
        try:
            return dict(torch.jit.load(path, map_location="cpu").state_dict())
        except RuntimeError:  # no TorchScript archive
            zipped = zipfile.is_zipfile(path)  # the format of torch before 1.6 cannot be mapped
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)


def reason(error: BaseException, at_most: int | None = None) -> str:
    """The first sentence of another library's complaint, on one line, no longer than asked for; its type if empty."""
    return " ".join(str(error).split()).split(". ")[0][:at_most] or type(error).__name__


def differences(missing: Sequence[str], strange: Sequence[str], noun: str = "tensors") -> str:
    """How the names in a file differ from those that are wanted, in words."""
    lacks = f"lacks {len(missing)} {noun} such as {missing[0]}" if missing else "lacks none"
    more = f"has {len(strange)} unknown ones such as {strange[0]}" if strange else "has no unknown ones"
    return f"it {lacks} and {more}"


def load_strictly(module: nn.Module, tensors: dict[str, Tensor], path: Path, what: str, assign: bool = False) -> None:
    """``load_state_dict`` whose complaint is one sentence; ``assign`` takes the tensors over instead of copying them.

    Raises:
        ValueError: if names or shapes are not those of the module.
    """
    wanted = module.state_dict()
    missing = [name for name in wanted if name not in tensors]
    strange = [name for name in tensors if name not in wanted]
    if missing or strange:
        raise ValueError(f"{str(path)!r} is not {what}: {differences(missing, strange)}")
    for name, tensor in wanted.items():
        if tensors[name].shape != tensor.shape:
            raise ValueError(
                f"{str(path)!r} is not {what} of this architecture: {name} must have shape {list(tensor.shape)}, "
                f"got {list(tensors[name].shape)}"
            )
    module.load_state_dict(tensors, assign=assign)


def open_network(
    build: Callable[[], nn.Module],
    tensors: dict[str, Tensor],
    path: Path,
    what: str,
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """A frozen network whose weights come from ``tensors``, each of them converted to ``dtype`` and put in its place.

    ``build`` runs on the meta device, so the weights are never there twice.

    Raises:
        ValueError: if names or shapes are not those of the network.
    """
    from accelerate import init_empty_weights  # installed with models; the losses go without

    with init_empty_weights(include_buffers=False):
        network = build()
    stored = {n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors.items()}
    load_strictly(network, stored, path, what, assign=True)
    return network.eval().requires_grad_(False)
