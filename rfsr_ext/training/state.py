"""Everything a training run must remember, as one flat dictionary of tensors that goes into one safetensors file."""

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

__all__ = ["TrainingState"]


class TrainingState:
    """Trained parameters, the optimizer's moments and the moving average of several named modules.

    Only parameters that require a gradient count; frozen ones belong to the base model.

    Args:
        modules: by name.
        optimizer: an Adam-like optimizer over their parameters.
        ema_decay: decay of the exponential moving average; as in diffusers it ramps up as (1+k)/(10+k).
    """

    def __init__(self, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer, ema_decay: float):
        self.parameters: dict[str, nn.Parameter] = {
            f"{group}.{name}": parameter
            for group, module in modules.items()
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }
        self.optimizer = optimizer
        self.ema = EMAModel(self.parameters.values(), decay=ema_decay)

    def tensors(self) -> dict[str, Tensor]:
        """All of the state; names start with ``parameters.``, ``ema.`` or ``optimizer.<key>.``."""
        tensors = {f"parameters.{name}": parameter for name, parameter in self.parameters.items()}
        tensors |= {f"ema.{name}": shadow for name, shadow in zip(self.parameters, self.ema.shadow_params, strict=True)}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{key}.{name}"] = torch.as_tensor(value)
        return tensors

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor], iteration: int) -> None:
        """Take over what `tensors` gave after ``iteration`` optimizer steps.

        Raises:
            ValueError: if the tensors are those of other modules; nothing is changed then.
        """
        for name, parameter in self.parameters.items():
            for kind in ("parameters", "ema"):
                found = tensors.get(f"{kind}.{name}")
                if found is None or found.shape != parameter.shape:
                    what = "nothing" if found is None else list(found.shape)
                    raise ValueError(
                        f"checkpoint is of another model: {kind}.{name} must have shape {list(parameter.shape)}, "
                        f"got {what}"
                    )
        known = {f"{kind}.{name}" for name in self.parameters for kind in ("parameters", "ema")}
        strange = [name for name in tensors if not name.startswith("optimizer.") and name not in known]
        if strange:
            raise ValueError(
                f"checkpoint is of another model: it has {len(strange)} unknown tensors such as {strange[0]}"
            )
        moments: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, key, parameter_name = name.split(".", 2)
                moments.setdefault(parameter_name, {})[key] = tensor
        for (name, parameter), shadow in zip(self.parameters.items(), self.ema.shadow_params, strict=True):
            parameter.copy_(tensors[f"parameters.{name}"])
            shadow.copy_(tensors[f"ema.{name}"])
            if name in moments:
                self.optimizer.state[parameter] = {
                    key: value.clone() if key == "step" else value.to(parameter.device)
                    for key, value in moments[name].items()
                }
        self.ema.optimization_step = iteration

    def ema_tensors(self) -> dict[str, Tensor]:
        """The moving average by parameter name (``group.parameter``)."""
        return dict(zip(self.parameters, self.ema.shadow_params, strict=True))
