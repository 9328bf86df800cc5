"""The noise process of one trajectory: z_t = α_t z_0 + σ_t ε, over any diffusers scheduler that can serve.

Everything else follows from α and σ at a timestep and from what the network predicts (r² = α² + σ²):

================ ========================= ============================= ==============================
network gives    training target           estimate of z_0               of which models
================ ========================= ============================= ==============================
``epsilon``      ε                         (z − σ ε) / α                 SD 1.5, SD 2 base, SeeSR, PASD
``v_prediction`` v = (α ε − σ z_0) / r     (α z − σ r v) / r²            SD 2.1, DiffBIR v2.1
``sample``       z_0                       z_0                           the mini model
``flow``         u = ε − z_0               (z − σ u) / (α + σ)           FLUX, SD 3
================ ========================= ============================= ==============================

Schedulers differ in α and σ (their *family*):

* variance-preserving, α² + σ² = 1: DDPM, DDIM, PNDM, DEIS, UniPC, DPM-Solver++, LCM, TCD;
* sigma-space, α = 1: Euler, Euler-ancestral, Heun, LMS, whose network sees z / √(1 + σ²); and EDM, whose network sees
  z / √(σ_data² + σ²) and whose output is scaled by the scheduler's own preconditioning (Karras et al., 2022);
* flow matching, α = 1 − σ: FlowMatchEuler, and DPM-Solver or UniPC with ``use_flow_sigmas``.
"""

import copy
import inspect
import itertools
import math

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from rfsr_ext.weights.reading import reason

__all__ = ["NonUniformProcess", "Process", "check_scheduler"]

_PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow")


def _family(scheduler) -> str:
    """One of "flow", "edm", "sigma" and "vp", told by what the scheduler does, not by what it is called."""
    if scheduler.config.get("use_flow_sigmas") or not hasattr(scheduler, "add_noise"):
        return "flow"
    if hasattr(scheduler, "precondition_outputs"):
        return "edm"
    probe = torch.ones(1, dtype=torch.float64)
    scaled = copy.deepcopy(scheduler).scale_model_input(probe, scheduler.timesteps[0])
    return "vp" if torch.equal(scaled, probe) else "sigma"


class Process:
    """One trajectory's noise process; it owns a copy of the scheduler, which nobody else steps.

    Multistep schedulers keep a history, so a process serves one trajectory and is then thrown away.

    Args:
        scheduler: a diffusers scheduler; it is copied and never changed.
        num_inference_steps: sampling steps asked for; ``len(process)`` says how many network evaluations the scheduler
            makes of them (PNDM one more, Heun almost twice as many).
        options: for the scheduler's ``set_timesteps``, such as ``mu=`` for FLUX.

    Attributes:
        timesteps: ``[len(process)]``, in sampling order.
        prediction_type: "epsilon", "v_prediction", "sample" or "flow".
        init_noise_sigma: standard deviation of pure noise to start from.

    Raises:
        ValueError: if ``num_inference_steps`` is no whole number of at least 1, or the scheduler's prediction type is
            not known.
    """

    def __init__(self, scheduler, num_inference_steps: int, **options):
        if num_inference_steps < 1 or num_inference_steps % 1:
            raise ValueError(f"num_inference_steps must be a whole number of at least 1, got {num_inference_steps}")
        self._scheduler = copy.deepcopy(scheduler)
        self._scheduler.set_timesteps(num_inference_steps, **options)
        self._family = _family(self._scheduler)
        self.prediction_type = self._prediction_type()
        # This class scales the input itself; Euler would warn that its own method was not called.
        if hasattr(self._scheduler, "is_scale_input_called"):
            self._scheduler.is_scale_input_called = True
        self.timesteps: Tensor = self._scheduler.timesteps
        self.init_noise_sigma = float(getattr(self._scheduler, "init_noise_sigma", 1.0))
        self._own = self._own_levels()
        self._accepts_generator = "generator" in inspect.signature(self._scheduler.step).parameters

    def __len__(self) -> int:
        return len(self.timesteps)

    def _prediction_type(self) -> str:
        given = self._scheduler.config.get("prediction_type", "epsilon")
        kind = "flow" if self._family == "flow" and given in ("epsilon", "flow_prediction") else given
        if self._family == "flow" and not hasattr(self._scheduler, "add_noise"):
            kind = "flow"
        if kind not in _PREDICTIONS:
            raise ValueError(
                f"scheduler prediction_type must be epsilon, v_prediction, sample or flow_prediction, got {given!r}"
            )
        return kind

    @property
    def last_timestep(self) -> int:
        """The noisiest timestep that the network was trained with, T.

        Raises:
            ValueError: if timesteps are no numbers from 0 to T (EDM).
        """
        if self._family == "edm":
            raise ValueError(
                f"scheduler must have timesteps from 0 to {self._scheduler.config.num_train_timesteps - 1}, got "
                f"{type(self._scheduler).__name__}, whose timesteps are ln(σ) / 4; take DDPMScheduler, say"
            )
        return self._scheduler.config.num_train_timesteps - 1

    # -- noise level ----------------------------------------------------------------------------------------------

    def _own_levels(self) -> dict[float, tuple[float, float]]:
        """(α, σ) of the trajectory's timesteps, from the scheduler's own sigmas where it has them (Karras's, say)."""
        sigmas = getattr(self._scheduler, "sigmas", None)
        if sigmas is None:
            return {}
        found = {}
        for timestep, sigma in zip(self.timesteps.tolist(), sigmas.tolist(), strict=False):
            found.setdefault(timestep, self._from_sigma(sigma))
        return found

    def _from_sigma(self, sigma: float) -> tuple[float, float]:
        if self._family == "flow":
            return 1 - sigma, sigma
        if self._family == "vp":  # these schedulers store σ/α
            return 1 / math.hypot(1, sigma), sigma / math.hypot(1, sigma)
        return 1.0, sigma

    def _closed_form(self, timestep: float) -> tuple[float, float]:
        """(α, σ) of any timestep the network was trained with, in the trajectory or not."""
        if self._family == "edm":
            return 1.0, math.exp(4 * timestep)  # the inverse of EDM's t = ln(σ) / 4
        if self._family == "flow":
            sigma = timestep / self._scheduler.config.num_train_timesteps
            return 1 - sigma, sigma
        alpha_bar = self._scheduler.alphas_cumprod
        last = len(alpha_bar) - 1
        if not 0 <= timestep <= last:
            raise ValueError(f"timestep must be in 0 … {last}, got {timestep:g}")
        below, above = math.floor(timestep), math.ceil(timestep)
        a, b = alpha_bar[below].item(), alpha_bar[above].item()
        mean = a + (timestep - below) * (b - a)
        alpha, sigma = math.sqrt(mean), math.sqrt(1 - mean)
        return (1.0, sigma / alpha) if self._family == "sigma" else (alpha, sigma)

    def level(self, timestep: Tensor | float) -> tuple[Tensor, Tensor]:
        """α and σ at one timestep or at several, in double precision and of ``timestep``'s shape."""
        timesteps = torch.as_tensor(timestep)
        values = timesteps.detach().cpu().double().reshape(-1).tolist()
        levels = [self._own.get(value) or self._closed_form(value) for value in values]
        alpha, sigma = torch.tensor(levels, dtype=torch.float64).reshape(*timesteps.shape, 2).unbind(-1)
        return alpha, sigma

    def noise_share(self, timestep: Tensor | float) -> Tensor:
        """σ² / (α² + σ²), the share of noise in z_t: 0 clean, 1 pure noise; comparable between all families."""
        alpha, sigma = self.level(timestep)
        return sigma.square() / (alpha.square() + sigma.square())

    def _broadcast(self, timestep: Tensor | float, like: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(x.reshape(-1, *[1] * (like.ndim - 1)).to(like) for x in self.level(timestep))

    # -- formulas -------------------------------------------------------------------------------------------------

    def add_noise(self, original_samples: Tensor, noise: Tensor, timestep: Tensor | float) -> Tensor:
        """z_t = α z_0 + σ ε at one timestep, or at one per sample."""
        alpha, sigma = self._broadcast(timestep, original_samples)
        return alpha * original_samples + sigma * noise

    def noise_towards(self, start: Tensor, original_samples: Tensor, noise: Tensor) -> Tensor:
        """ε + (start − z_0) α_T / σ_T, T the first timestep: noise with which z_T = α_T start + σ_T ε.

        Every z_t then lies on the straight way from there to z_0, as in ResShift (arXiv 2307.12348).
        """
        alpha, sigma = self._broadcast(self.timesteps[0], original_samples)
        return noise + (start - original_samples) * alpha / sigma

    def scale_model_input(self, latents: Tensor, timestep: Tensor | float) -> Tensor:
        """What the network wants to see of z_t: z_t itself, or in sigma-space z_t brought to the scale of z_0."""
        if self._family in ("vp", "flow"):
            return latents
        sigma_data = self._scheduler.config.sigma_data if self._family == "edm" else 1.0
        _, sigma = self._broadcast(timestep, latents)
        return latents / (sigma.square() + sigma_data**2).sqrt()

    def pred_original_sample(self, model_output: Tensor, timestep: Tensor | float, latents: Tensor) -> Tensor:
        """The z_0 estimate that the network's output implies at z_t (unscaled latents), see the table above."""
        if self.prediction_type == "sample":
            return model_output
        alpha, sigma = self._broadcast(timestep, latents)
        if self._family == "edm":
            return self._scheduler.precondition_outputs(latents, model_output, sigma)
        if self.prediction_type == "epsilon":
            return (latents - sigma * model_output) / alpha
        if self.prediction_type == "flow":
            return (latents - sigma * model_output) / (alpha + sigma)
        square = alpha.square() + sigma.square()
        return (alpha * latents - sigma * square.sqrt() * model_output) / square

    def pred_noise(self, pred_original_sample: Tensor, timestep: Tensor | float, latents: Tensor) -> Tensor:
        """The noise that z_t holds beside the z_0 estimate: ε̂ = (z_t − α ẑ_0) / σ."""
        alpha, sigma = self._broadcast(timestep, latents)
        return (latents - alpha * pred_original_sample) / sigma

    def perfect_output(self, original_samples: Tensor, timestep: Tensor | float, latents: Tensor) -> Tensor:
        """The network's output at z_t whose z_0 estimate is ``original_samples``: `pred_original_sample`, solved."""
        at_zero = self.pred_original_sample(torch.zeros_like(latents), timestep, latents)
        at_one = self.pred_original_sample(torch.ones_like(latents), timestep, latents)
        return (original_samples - at_zero) / (at_one - at_zero)  # the estimate is linear in the output

    def target(self, original_samples: Tensor, noise: Tensor, timestep: Tensor | float) -> Tensor:
        """What a network is trained to give for z_0 and ε, see the table above (EDM: before its preconditioning)."""
        if self._family == "edm":
            return self.perfect_output(original_samples, timestep, self.add_noise(original_samples, noise, timestep))
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return original_samples
        if self.prediction_type == "flow":
            return noise - original_samples
        alpha, sigma = self._broadcast(timestep, original_samples)
        return (alpha * noise - sigma * original_samples) / (alpha.square() + sigma.square()).sqrt()

    def is_guided(self, timestep: Tensor | float) -> bool:
        """Whether classifier-free guidance, where it is asked for, applies at this timestep of the trajectory."""
        return True

    def step(self, model_output: Tensor, timestep: Tensor, latents: Tensor, generator=None) -> Tensor:
        """The scheduler's own step from z_t to the next latents; call it once for every timestep, in order."""
        options = {"generator": generator} if self._accepts_generator else {}
        return self._scheduler.step(model_output, timestep, latents, **options, return_dict=False)[0]


class NonUniformProcess(Process):
    """CCSR's non-uniform sampling: one leap to an estimate, re-noised to ``t_max``, then steps to ``t_min``.

    Of ``n`` uniform timesteps u_1 > … > u_n, the trajectory takes ``start_timestep``, then those from the last
    round(n·t_max) to, not included, the last round(n·t_min). After the first evaluation the z_0 estimate gets fresh
    noise; after the last one the estimate itself is the result. The network is evaluated
    1 + round(n·t_max) − round(n·t_min) times (CCSR, arXiv 2401.00877, section 3.2; 45, 2/3 and 1/3 give 16; 6, 2/3 and
    1/2 give 2). All three numbers are free at inference: they need no other weights.

    The two versions of CCSR differ in three rules:

    ======= ======================== ============================================= ====================================
    version uniform timesteps        noise of the leap is that of                  classifier-free guidance
    ======= ======================== ============================================= ====================================
    "v1"    999 … 0, both ends taken the (1 + round((n − 1)·t_max))-th last u_i    at every evaluation
    "v2"    the scheduler's own      the next timestep, round(n·t_max)-th last u_i at every evaluation but the first
    ======= ======================== ============================================= ====================================

    Both leap to the same u_i for most n (45, say, but not 20: there v1's latents hold a little more noise than its
    network is told, as its authors have it). The authors of v2 take Stable Diffusion 2.1's timesteps, "leading" with
    ``steps_offset`` 1.

    DDPM, the authors' sampler, takes its own steps, which draw noise. Any other scheduler lends its noise levels alone,
    and a step from t to s is that of DDIM without noise, z_s = α_s ẑ_0 + σ_s (z_t − α_t ẑ_0) / σ_t: Euler's own step,
    on straight lines as well (flow matching), and the first order of the multistep solvers.

    What the authors' code does not survive is defined here: with ``num_inference_steps`` 1, or where rounding leaves no
    timestep after the first, the first estimate is the result; where round(n·t_min) is 0 no step is left out; with
    ``t_max`` 1 there is no leap, and sampling is uniform down to ``t_min``. No timestep comes twice.

    Args:
        scheduler, num_inference_steps, options: as for `Process`.
        t_max, t_min: shares of the schedule, 0 ≤ t_min ≤ t_max < 1, or t_max = 1.
        version: "v1" or "v2", whose rules to follow.
        start_timestep: of the first evaluation, u_1 by default; CCSR's is 999.

    Raises:
        ValueError: if the shares or the timestep are out of range, the version is not known, or "v1" is asked for of
            a scheduler whose timesteps are no numbers from 0 to 999 (EDM).
    """

    def __init__(
        self,
        scheduler,
        num_inference_steps: int,
        t_max: float = 2 / 3,
        t_min: float = 1 / 3,
        version: str = "v2",
        start_timestep: int | None = None,
        **options,
    ):
        if not 0 <= t_min <= t_max <= 1:
            raise ValueError(
                f"t_max and t_min must satisfy t_max = 1 (no leap) or 0 <= t_min <= t_max < 1, got {t_max} and {t_min}"
            )
        if version not in ("v1", "v2"):
            raise ValueError(f"version must be v1 or v2, got {version!r}")
        super().__init__(scheduler, num_inference_steps, **options)
        uniform = self.timesteps.unique(sorted=True).flip(0)  # some schedulers evaluate twice at one
        # to step by itself a scheduler must take any timesteps, and must not count them
        takes_timesteps = "timesteps" in inspect.signature(self._scheduler.set_timesteps).parameters
        self._steps_itself = takes_timesteps and not hasattr(self._scheduler, "step_index")
        if version == "v1":
            last, count = self.last_timestep, num_inference_steps
            # guided diffusion's sum of strides, which can round 499.5 down
            sums = itertools.accumulate([last / max(count - 1, 1)] * (count - 1), initial=0.0)
            uniform = torch.tensor([round(t) for t in sums][::-1], device=uniform.device)
            if self._steps_itself:
                self._scheduler.set_timesteps(timesteps=uniform.tolist())
        n = len(uniform)
        first = uniform[:1] if start_timestep is None else torch.full_like(uniform[:1], start_timestep)
        self.level(first)  # refuses a timestep that the network was not trained with
        kept = uniform[n - round(n * t_max) : n - round(n * t_min)] if n > 1 else uniform[:0]
        self._leaps = t_max < 1 or not len(kept)
        self.timesteps = torch.cat([first, kept[kept < first]]) if self._leaps else kept
        self._renoised = uniform[n - 1 - round((n - 1) * t_max)] if version == "v1" else self.timesteps[1:2]
        self._guides_leap = version == "v1"

    def is_guided(self, timestep: Tensor | float) -> bool:
        return self._guides_leap or not self._leaps or float(timestep) != float(self.timesteps[0])

    def step(self, model_output: Tensor, timestep: Tensor, latents: Tensor, generator=None) -> Tensor:
        place = self.timesteps.tolist().index(float(timestep))
        last, leap = place == len(self) - 1, place == 0 and self._leaps
        if self._steps_itself and not last and not leap:
            return super().step(model_output, timestep, latents, generator)
        estimate = self.pred_original_sample(model_output, timestep, latents)
        if last:
            return estimate
        if leap:
            noise = randn_tensor(estimate.shape, generator=generator, device=estimate.device, dtype=estimate.dtype)
            return self.add_noise(estimate, noise, self._renoised)
        return self.add_noise(estimate, self.pred_noise(estimate, timestep, latents), self.timesteps[place + 1])


_KNOWN = 3.0  # beyond 1, so that a scheduler which clips its estimates is noticed
_PROBE_STEPS = 25  # enough for samplers that are right in the limit only, such as PNDM on velocities


def check_scheduler(scheduler) -> None:
    """Refuse a scheduler whose arithmetic is not that of `Process`.

    A network that always knows z_0 = 3 is sampled for 25 steps on 4096 numbers. Whatever the sampler draws or solves,
    z_t must then have mean 3 α and standard deviation σ before every step, and the end must be 3.

    Raises:
        ValueError: if it cannot serve; the sentence says why.
    """
    name = type(scheduler).__name__
    advice = "take another, such as DDIMScheduler.from_config(scheduler.config, clip_sample=False)"
    if not all(hasattr(scheduler, part) for part in ("config", "set_timesteps", "step", "scale_model_input")) and not (
        hasattr(scheduler, "scale_noise")
    ):
        raise ValueError(f"scheduler must be a diffusers scheduler, got {name}; {advice}")
    options = {"mu": 0.0} if scheduler.config.get("use_dynamic_shifting") else {}
    try:
        process = Process(scheduler, _PROBE_STEPS, **options)
        fault = _fault(process)
    except Exception as error:
        fault = reason(error, 200)
    if fault:
        raise ValueError(f"scheduler {name} cannot serve: {fault}; {advice}")


def _fault(process: Process) -> str:
    """What is wrong with a trajectory whose network always knows that z_0 is `_KNOWN`; empty if nothing is."""
    if (process.timesteps.diff() > 0).any():
        return "its timesteps rise, from the image to noise"
    known = torch.full((4096, 1, 1, 1), _KNOWN, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(known.shape, generator=generator, dtype=known.dtype)
    latents = process.add_noise(known, noise, process.timesteps[0])
    for timestep in process.timesteps:
        alpha, sigma = (x.item() for x in process.level(timestep))
        mean, deviation = latents.mean().item(), latents.std().item()
        if not (abs(mean - alpha * _KNOWN) < 0.1 * sigma + 0.05 and abs(deviation - sigma) < 0.1 * sigma + 0.05):
            return (
                f"before timestep {timestep:g} a perfect network has z_t of mean {mean:.3g} and deviation "
                f"{deviation:.3g} instead of {alpha * _KNOWN:.3g} and {sigma:.3g}"
            )
        output = process.perfect_output(known, timestep, latents)
        latents = process.step(output, timestep, latents, generator)
    end = latents.mean().item()
    return "" if abs(end - _KNOWN) < 0.1 else f"with a perfect network it ends at {end:.3g} instead of {_KNOWN:g}"
