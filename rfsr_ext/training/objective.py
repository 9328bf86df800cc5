"""The RFSR loss of one batch (paper section 3.5): roll out without gradient, take one step with it, weigh by window."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rfsr_ext.memory import on_device
from rfsr_ext.models import Condition, ISRModel
from rfsr_ext.rewards import WeightedReward, check_rewards, reward_loss
from rfsr_ext.sampling import Rollout, State, TimestepWindows, denoise
from rfsr_ext.training.setup import as_reference

__all__ = ["Prediction", "RFSRObjective"]


@dataclass(frozen=True)
class Prediction:
    """What one denoising step with gradient gives.

    Attributes:
        model_output: the network's output at z_t.
        pred_original_sample: the z_0 estimate it implies.
        images: the estimate decoded, I_t (eq. 3), not clamped, in single precision at least: what half precision leaves
            of a loss would be lost in it.
    """

    model_output: Tensor
    pred_original_sample: Tensor
    images: Tensor


class RFSRObjective:
    """Eq. 7 for a batch at one sampling step:

    * st in the structure window: λ_dwt · L_dwt(I_t, I_gt), eq. 2;
    * st in the reward window: L_reward(I_t, c_t) + λ_r · L_style(I_t, I′_t), eq. 5 and 6, where I′_t is what the
      frozen pre-trained model makes of the same z_t under the same condition.

    Under autocast networks compute in half precision, rewards among them, but structure and style losses do not.

    Args:
        model: the model being fine-tuned.
        windows: which sampling steps get which loss.
        structure_loss: ``f(images, ground truth)``, or None.
        lambda_structure: λ_dwt.
        rewards: the weighted rewards of eq. 5.
        balance_rewards: see `rfsr_ext.rewards.reward_loss`.
        style_loss: ``f(images, reference images)``, the paper's Gram-KL, or None.
        kl: hold the style by the mean squared change of the network's output instead (Table 4, "KL"): up to a factor,
            the Kullback–Leibler divergence between the two models' denoising steps.
        lambda_style: λ_r.
        reference: the frozen pre-trained model, for ``style_loss`` and ``kl``; None for ``model`` without its adapters.
        offload_reference: keep the reference's own networks where they are, on the CPU, except while they are used.
        num_inference_steps: of the rollout; None takes the recipe's.
        guidance_scale: of classifier-free guidance in the rollout and in the step with gradient; 1 is none, as in the
            paper.
        negative_prompt: of that guidance.
    """

    def __init__(
        self,
        model: ISRModel,
        windows: TimestepWindows,
        *,
        structure_loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        lambda_structure: float = 5e-4,
        rewards: list[WeightedReward] = (),
        balance_rewards: bool = False,
        style_loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        kl: bool = False,
        lambda_style: float = 5e-5,
        reference: ISRModel | None = None,
        offload_reference: bool = False,
        num_inference_steps: int | None = None,
        guidance_scale: float = 1.0,
        negative_prompt: str = "",
    ):
        check_rewards(rewards, windows.reward)
        self.model, self.windows = model, windows
        self.structure_loss, self.lambda_structure = structure_loss, lambda_structure
        self.rewards, self.balance_rewards = list(rewards), balance_rewards
        self.style_loss, self.kl = style_loss, kl
        self.lambda_style = lambda_style
        self.reference, self.offload_reference = reference, offload_reference
        self.num_inference_steps = num_inference_steps
        self.guidance_scale, self.negative_prompt = guidance_scale, negative_prompt

    def predict(self, model: ISRModel, state: State, condition: Condition) -> Prediction:
        """One denoising step at z_t and its decoded z_0 estimate."""
        process = state.process
        output = denoise(model, process, state.latents, state.timestep, condition, self.guidance_scale)
        estimate = process.pred_original_sample(output, state.timestep, state.latents)
        images = model.decode(estimate)
        return Prediction(output, estimate, images.to(torch.promote_types(images.dtype, torch.float32)))

    @torch.no_grad()
    def predict_reference(self, state: State, condition: Condition) -> Prediction:
        """The same step by the pre-trained model."""
        with as_reference(self.model, self.reference) as reference:
            own = reference.trainable_networks().values() if self.reference and self.offload_reference else ()
            with on_device(own, self.model.device):
                return self.predict(reference, state, condition)

    def begin(self, lr: Tensor, prompts: list[str], generator=None) -> Rollout:
        """A batch's trajectory, at x_T; arguments as in `__call__`."""
        if not all(prompts):
            seen = self.model.describe(lr.to(self.model.device, self.model.dtype))
            prompts = [prompt or text for prompt, text in zip(prompts, seen, strict=True)]
        negative = None if self.guidance_scale == 1 else [self.negative_prompt] * len(prompts)
        condition = self.model.condition(lr, prompts, negative)
        return Rollout(self.model, condition, generator, self.num_inference_steps, self.guidance_scale)

    def __call__(
        self,
        lr: Tensor,
        gt: Tensor,
        prompts: list[str],
        step: int,
        generator=None,
        rollout: Rollout | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch at sampling step ``step``, with what to log (detached scalars).

        Args:
            lr: ``[N, 3, h, w]`` in [0, 1].
            gt: ``[N, 3, scale·h, scale·w]`` in [0, 1].
            prompts: N prompts; in place of an empty one stands what the model itself says of the image.
            step: a sampling step inside one of the windows.
            generator: noise of x_T (and of a stochastic sampler), one or a list of N.
            rollout: the batch's trajectory, from `begin` (with that generator), at ``step`` or before it; afterwards it
                stands one step past it, where the trained output has taken it.  None begins a new one.

        Raises:
            ValueError: if ``gt`` does not fit ``lr`` or ``step`` is in no window.
        """
        expected = (*lr.shape[:2], *(n * self.model.scale for n in lr.shape[2:]))
        if gt.shape != expected:
            raise ValueError(f"gt must have shape {list(expected)} for lr of {list(lr.shape)}, got {list(gt.shape)}")
        in_structure, in_reward = self.windows.in_structure(step), self.windows.in_reward(step)
        if not (in_structure or in_reward):
            raise ValueError(f"step must be one of {self.windows.steps()}, got {step}")
        if rollout is None:
            rollout = self.begin(lr, prompts, generator)
        state, condition = rollout.to(step), rollout.condition
        prediction = self.predict(self.model, state, condition)
        loss, logs = prediction.images.new_zeros((), dtype=torch.float32), {}
        exactly = torch.autocast(prediction.images.device.type, enabled=False)
        if in_structure and self.structure_loss is not None:
            with exactly:
                logs["structure"] = self.structure_loss(prediction.images, gt.to(prediction.images))
            loss = loss + self.lambda_structure * logs["structure"]
        if in_reward:
            images = prediction.images.clamp(0, 1)
            value, scores = reward_loss(
                self.rewards, images, condition.prompts, step, rollout.generator, self.balance_rewards
            )
            loss = loss + value
            logs |= {f"reward/{name}": score.mean() for name, score in scores.items()}
            if self.style_loss is not None or self.kl:
                before = self.predict_reference(state, condition)
            if self.style_loss is not None:
                with exactly:
                    logs["style"] = self.style_loss(images, before.images.clamp(0, 1))
            elif self.kl:
                logs["style"] = F.mse_loss(prediction.model_output.float(), before.model_output.float())
            if "style" in logs:
                loss = loss + self.lambda_style * logs["style"]
        rollout.advance(prediction.model_output)
        return loss, {name: value.detach().float() for name, value in logs.items()} | {"loss": loss.detach()}
