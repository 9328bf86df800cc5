"""Settings of DP2O."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from rfsr_ext.training.config import Count, RunConfig, Text

__all__ = ["DP2OConfig"]


class DP2OConfig(RunConfig):
    """Every setting of `DP2OTrainer`; the defaults are the paper's for C-SD2 (sections 4 and 5.1).

    Raises:
        ValueError: see `RunConfig`.
    """

    presets: ClassVar[tuple[str, ...]] = ("dp2o-mini", "dp2o-sd2", "dp2o-flux")

    method: Literal["dp2o"] = Field("dp2o", description="the method that trains: dp2o")
    images: Count = Field(30_000, description="LR images that candidates are sampled for, the first of the data")
    candidates: Annotated[int, Field(ge=2, le=10**6)] = Field(
        32, description="M, results per LR image that differ in their noise"
    )
    selected: Count = Field(
        8, description="N: the best N and the worst N of the M make N² pairs; N/M is 1/4 for C-SD2, 1/16 for C-FLUX"
    )
    num_inference_steps: Annotated[int, Field(ge=1, le=1000)] | None = Field(
        None, description="sampling steps of candidates and of held-out results; null takes the model's own"
    )
    sampling_batch_size: Count = Field(8, description="candidates that are sampled and scored at once")
    preferences: Text | None = Field(
        None, description="folder of candidates and scores, which other runs may share; null for one in output_dir"
    )
    full_reference: tuple[Text, ...] = Field(
        ("lpips", "topiq_fr", "pyiqa:afine_fr"),
        description="metrics of the reward that compare with the ground truth; pyiqa:NAME is any of pyiqa",
    )
    no_reference: tuple[Text, ...] = Field(
        ("maniqa", "musiq", "clipiqa+", "topiq_nr", "pyiqa:afine_nr", "pyiqa:qalign"),
        description="metrics and rewards that see the result alone, or package.module:Name of a function that returns "
        "a Reward",
    )
    reward_scope: Literal["group", "set"] = Field(
        "group", description="whose smallest and largest score bring a metric to [0, 1]: of the image or of all"
    )
    intra_group_weight: bool = Field(True, description="pairs with a larger gap of reward count more (section 4.3)")
    inter_group_weight: bool = Field(True, description="images whose rewards spread more count more (section 4.3)")
    beta: Annotated[float, Field(gt=0, le=1e12)] = Field(5000.0, description="β, how closely the reference is held")
    beta_convention: Literal["half-mean", "mean", "sum"] = Field(
        "half-mean", description="what β multiplies: half-mean (Diffusion-DPO's code), mean or sum; see docs/dp2o.md"
    )
    timestep_sampling: Literal["uniform", "logit-normal", "sampler"] = Field(
        "uniform",
        description="timesteps of training: uniform, logit-normal (many in the middle) or those of the sampler",
    )
    rounds: Annotated[int, Field(ge=1, le=1000)] = Field(
        1, description="1 is the paper's; in each further one the tuned model samples new candidates and trains on them"
    )
    reference: Literal["base", "round"] = Field(
        "base", description="what further rounds are held to: the base model, or the model that the round began with"
    )
    validation_seeds: Annotated[int, Field(ge=2, le=1000)] = Field(
        4, description="results per held-out crop, whose best, mean and worst are measured"
    )
    report_crops: Annotated[int, Field(ge=0, le=10**6)] = Field(
        12, description="crops of other photographs for the comparison at the end; 0 for none"
    )
    report_seeds: Annotated[int, Field(ge=2, le=1000)] = Field(16, description="results for each of them")
    max_psnr_drop: Annotated[float, Field(ge=-100, le=100)] = Field(
        1.0, description='a checkpoint is "best" only if its held-out PSNR is at most this many dB below the base model'
    )
    batch_size: Annotated[int, Field(ge=1, le=2**16)] = Field(
        1024, description="pairs per optimizer step, over all processes and accumulation steps"
    )
    iterations: Annotated[int, Field(ge=1, le=10**7)] = Field(1000, description="optimizer steps of a round")
    learning_rate: Annotated[float, Field(gt=0, le=1)] = Field(2e-5, description="of Adam")
    output_dir: Text = Field("runs/dp2o", description="folder for everything the run writes")

    @model_validator(mode="after")
    def _check_pairs(self) -> Self:
        if 2 * self.selected > self.candidates:
            raise ValueError(
                f"candidates must be at least twice selected ({self.selected}), because the best and the worst must be "
                f"others, got {self.candidates}"
            )
        if not self.full_reference and not self.no_reference:
            raise ValueError("full_reference and no_reference must name at least one metric, got none")
        if self.reference == "round" and self.lora_rank:
            raise ValueError("reference must be base with lora_rank, where it is the model without adapters, got round")
        return self

    def folder(self, round_: int) -> Path:
        """Of a round's candidates, counted from 1."""
        return Path(self.preferences or Path(self.output_dir) / "preferences") / f"round-{round_}"

    def of_round(self, round_: int) -> Self:
        """The settings that a round trains with: all but the last have a folder of their own."""
        if round_ == self.rounds:
            return self
        return self.replace(output_dir=str(Path(self.output_dir) / f"round-{round_}"))
