"""Settings of CCSR's training: of each of its two stages, and of both in a row."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from rfsr_ext.training.config import RunConfig, Text, Weight

__all__ = ["CCSRConfig", "CCSRStage1Config", "CCSRStage2Config"]

Share = Annotated[float, Field(gt=0, lt=1)]


class _StageConfig(RunConfig):
    """What both stages are asked."""

    validation_seeds: Annotated[int, Field(ge=2, le=1000)] = Field(
        3, description="samples of every held-out crop, whose spread is measured"
    )
    validation_distance: Literal["lpips-vgg", "vgg", "vgg-random"] = Field(
        "lpips-vgg", description='held-out distance, by which the "best" weights are chosen; see perceptual_loss'
    )
    max_psnr_drop: Annotated[float, Field(ge=-100, le=100)] = Field(
        1.0, description='weights are "best" only if their held-out PSNR is at most this many dB below the first'
    )


class CCSRStage1Config(_StageConfig):
    """Settings of stage 1, see `rfsr_ext.training.ccsr.Consistency`; the defaults are those of CCSR v2's code.

    Raises:
        ValueError: see `RunConfig`.
    """

    method: Literal["ccsr-stage1"] = Field("ccsr-stage1", description="the method that trains: ccsr-stage1")
    variant: Literal["v1", "v2"] = Field("v2", description="v1 adds a term for the noise predicted at t_max")
    t_max: Share = Field(
        0.6667, description="share of the schedule: below it denoising is trained, to it the leap goes"
    )
    start: Literal["gt", "lr"] = Field("gt", description="whose latents are noised to T: gt as published, or lr")
    lambda_consistency: Weight = Field(1.0, description="weight of the terms at T and at t_max")
    trained: dict[str, str] | None = Field(
        {"controlnet": ""},
        description="by network a pattern of parameter names, published the ControlNet; null for what the model says",
    )


class CCSRStage2Config(_StageConfig):
    """Settings of stage 2, see `rfsr_ext.training.ccsr.DecoderTuning`; the defaults are those of CCSR v2's code.

    Raises:
        ValueError: see `RunConfig`; also if a discriminator over DINO has no folder.
    """

    method: Literal["ccsr-stage2"] = Field("ccsr-stage2", description="the method that trains: ccsr-stage2")
    num_inference_steps: Annotated[int, Field(ge=1, le=1000)] | None = Field(
        None, description="of the truncated sampling that makes the estimates; null takes the model's own"
    )
    reconstruction_loss: Literal["l1", "l2"] = Field("l2", description="l1 (v1) or l2 (v2)")
    lambda_reconstruction: Weight = Field(1.0, description="its weight")
    perceptual_loss: Literal["lpips-vgg", "vgg", "vgg-random", "none"] = Field(
        "lpips-vgg",
        description="lpips-vgg (pyiqa's, its weights on disk), vgg (features of ImageNet's VGG19), vgg-random (of a "
        "random one, a stand-in that needs no file) or none",
    )
    lambda_perceptual: Weight = Field(1.0, description="its weight")
    discriminator: Literal["patch", "dino"] = Field("patch", description="patch (PatchGAN, v1) or dino (v2)")
    discriminator_channels: Annotated[int, Field(ge=1, le=1024)] = Field(64, description="of PatchGAN's first layer")
    discriminator_norm: Literal["batch", "group"] = Field(
        "batch", description="of PatchGAN: batch as published, or group, with which a batch may be cut at will"
    )
    dino: Text | None = Field(None, description="folder of transformers' DINO ViT-S/16, for discriminator: dino")
    dino_condition: Text | None = Field(
        None, description="folder of DINOv2 ViT-S/14, which tells that discriminator of the LR image; null for nothing"
    )
    lambda_adversarial: Weight = Field(0.05, description="weight of the adversarial loss")
    adaptive_weight: bool = Field(
        False, description="multiply it by the ratio of both losses' gradients at the decoder's last layer (v1)"
    )
    adversarial_start: Annotated[int, Field(ge=0, le=10**7)] = Field(
        100,
        description="iterations before the decoder sees the adversarial loss; its discriminator learns from the first",
    )

    @model_validator(mode="after")
    def _check_dino(self) -> Self:
        if (self.discriminator == "dino") != (self.dino is not None):
            raise ValueError(
                "dino must be the folder of transformers' DINO ViT-S/16 for discriminator: dino, and null for patch, "
                f"got {self.dino!r} for {self.discriminator}"
            )
        return self


class CCSRConfig(RunConfig):
    """Both stages in a row: what stands outside them holds for both, ``output_dir`` receives a folder for each.

    Raises:
        ValueError: see `RunConfig`; also for what is wrong in a stage.
    """

    presets = ("ccsr-mini", "ccsr-v1", "ccsr-v2")

    method: Literal["ccsr"] = Field("ccsr", description="the method that trains: ccsr")
    stage1: dict[str, Any] | None = Field(
        {},
        description="settings of stage 1 alone (`rfsr config show` of a file with method: ccsr-stage1); null for none",
    )
    stage2: dict[str, Any] | None = Field(
        {},
        description="settings of stage 2 alone (`rfsr config show` of a file with method: ccsr-stage2); null for none",
    )

    @model_validator(mode="after")
    def _check_stages(self) -> Self:
        if not self.stages():
            raise ValueError("stage1 or stage2 must be a mapping, because without both nothing is trained, got null")
        return self

    def stages(self) -> list[_StageConfig]:
        """The settings of each stage that is not null; the second goes on with what the first has made."""
        shared = {name: getattr(self, name) for name in RunConfig.model_fields if name != "method"}
        found: list[_StageConfig] = []
        for name, kind in (("stage1", CCSRStage1Config), ("stage2", CCSRStage2Config)):
            own: Mapping[str, Any] | None = getattr(self, name)
            if own is None:
                continue
            values = shared | own | {"output_dir": f"{self.output_dir}/{name}"}
            if found:
                values["model"] = f"{found[-1].output_dir}/model"
                values["model_options"] = own.get("model_options", {})  # the folder has those of the first
            found.append(kind.from_dict(values, name))
        return found
