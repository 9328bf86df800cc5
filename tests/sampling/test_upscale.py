import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.memory import Live
from rfsr_ext.models import ISRModel, Recipe
from rfsr_ext.sampling import Tiles, adain_color_fix, generators, sample, upscale, wavelet_color_fix
from rfsr_ext.sampling.tiles import Enlarged
from rfsr_ext.sampling.upscale import _pad, result_bytes, tiling
from tests.tiny import sd_scheduler


class PixelwiseModel(ISRModel):
    """A model whose networks look at one latent pixel at a time.

    Tiling can change nothing about it, so whatever differs is a mistake of the tiles.
    """

    scale, multiple, latent_channels, vae_scale_factor = 4, 8, 3, 4

    def __init__(self):
        self.networks, self.trained = {"network": torch.nn.Linear(1, 1)}, {"network": ""}
        self.recipe, self.scheduler = Recipe(num_inference_steps=4), sd_scheduler()
        self.seen = [0]  # sides of what entered a network
        super().__init__()

    def _see(self, pixels):
        self.seen.extend(pixels.shape[-2:])

    def control(self, image):
        self._see(image)
        return {"picture": image, "latent": F.avg_pool2d(image, 4)}

    def embed(self, prompts):
        return {"text": torch.full((len(prompts), 2, 3), float(len(prompts[0])))}

    def predict(self, latents, timestep, condition):
        self._see(condition.image)
        parts = (latents, condition, condition.prompts, *condition.spatial.values(), *condition.shared.values())
        assert len({len(part) for part in parts}) == 1
        assert condition.spatial["picture"].shape == condition.image.shape
        seen = F.avg_pool2d(condition.spatial["picture"], 4) + condition.spatial["latent"]
        return torch.sin(3 * latents + seen) + condition.shared["text"].mean() / 10

    def encode(self, images):
        self._see(images)
        return F.avg_pool2d(images, 4) * 2 - 1

    def decode(self, latents):
        self._see(latents.repeat_interleave(4, -1).repeat_interleave(4, -2))
        return (latents.repeat_interleave(4, -1).repeat_interleave(4, -2) + 1) / 2


QUIET = {"progress": False}


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from([(32, 8), (32, 0), (40, 24), (33, 5)]),
    st.integers(1, 5),
    st.sampled_from([1.0, 2.5]),
)
def test_tiles_change_nothing_for_a_pixelwise_model(height, width, tiling, batch_size, guidance):
    image = torch.rand(3, height, width)
    tile, overlap = tiling
    options = {"color_fix": None, "guidance_scale": guidance, "negative_prompt": "blurry", **QUIET}
    whole = upscale(PixelwiseModel(), image, "cat", tile=4096, **options)
    model = PixelwiseModel()
    tiled = upscale(model, image, "cat", tile=tile, overlap=overlap, batch_size=batch_size, **options)
    assert tiled.shape == (3, 4 * height, 4 * width)
    assert max(model.seen) <= math.ceil(tile / 8) * 8  # nothing larger ever entered a network
    torch.testing.assert_close(tiled, whole, atol=1e-4, rtol=0)


def test_a_small_tile_alone_is_enough():
    model = PixelwiseModel()
    assert [tiling(model, tile)[:2] for tile in (1, 8, 9, 64)] == [(8, 0), (8, 0), (16, 8), (64, 16)]


@settings(deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 40), st.lists(st.integers(0, 8), min_size=2, max_size=2, unique=True).map(sorted)
)
def test_tiles_cover_the_image(height, width, tiling):
    overlap, tile = (8 * n for n in tiling)
    tiles = Tiles(8 * height, 8 * width, tile, overlap, unit=8, batch_size=3)
    for starts, length in (
        (sorted({top for top, _ in tiles.corners()}), 8 * height),
        (sorted({left for _, left in tiles.corners()}), 8 * width),
    ):
        assert starts[0] == 0 and starts[-1] + min(tile, length) == length
        assert all(start % 8 == 0 for start in starts)
        assert all(a < b <= a + tile - overlap for a, b in zip(starts, starts[1:], strict=False))


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.sampled_from([1, 2, 4]))
def test_blending_gives_back_what_was_cut(height, width, factor):
    """Weights sum to one everywhere, between images, latents and pixels alike."""
    tiles = Tiles(8 * height, 8 * width, 32, 8, unit=8, batch_size=2)
    pixels = torch.rand(1, 3, 8 * height, 8 * width)
    torch.testing.assert_close(
        tiles.blend(lambda cut, n: F.avg_pool2d(cut(pixels), factor)), F.avg_pool2d(pixels, factor), atol=1e-5, rtol=0
    )


def test_blending_hides_disagreement():
    """Tiles of different brightness meet in a ramp: no step is as large as a seam would be."""
    tiles = Tiles(64, 112, 64, 16, unit=8, batch_size=1)
    brightness = iter([0.0, 1.0])
    image = torch.rand(1, 3, 64, 112)
    result = tiles.blend(lambda cut, n: torch.full_like(cut(image), next(brightness)))
    assert result[..., :48].abs().max() == 0 and (result[..., 64:] == 1).all()
    assert result.diff(dim=-1).max() < 0.15
    assert result.diff(dim=-1).min() >= 0


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_a_part_of_the_enlarged_image_is_that_of_the_whole(scale):
    model = PixelwiseModel()
    model.scale = scale
    lr = torch.rand(1, 3, 23, 31)
    whole, parts = model.first_stage(lr), Enlarged(model, lr)
    assert parts.shape == whole.shape
    height, width = whole.shape[-2:]
    for rows in (slice(height), slice(0, 8), slice(17, 30), slice(height - 5, height + 9)):
        for columns in (slice(width), slice(0, 7), slice(32, 64), slice(width - 1, width)):
            torch.testing.assert_close(parts[..., rows, columns], whole[..., rows, columns], atol=1e-5, rtol=0)


@pytest.mark.parametrize("color_fix", ["wavelet", "adain", None])
def test_nothing_but_the_result_is_as_large_as_it(color_fix):
    """What a taller picture takes more is the result in float32 and latents, an eighth of that here."""
    model, peaks = PixelwiseModel(), []
    heights = 256, 512
    for height in heights:
        image = torch.rand(3, height, 64)
        with Live() as live:
            upscale(model, image, tile=128, num_inference_steps=2, color_fix=color_fix, **QUIET)
        peaks.append(live.peak)
    pixels = 16 * 64 * (heights[1] - heights[0])
    assert 12 * pixels <= peaks[1] - peaks[0] <= 1.2 * 12 * pixels
    assert peaks[1] - peaks[0] <= result_bytes(model, heights[1] - heights[0], 64)


# -- the real architecture --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(8, 8), (32, 32), (4, 30)])
def test_an_image_of_one_tile_is_sampled_whole(model, size):
    image = torch.rand(3, *size)
    expected = sample(model, image[None], ["cat"], generators(3, [0]), 3)[0]
    assert torch.equal(upscale(model, image, "cat", seed=3, num_inference_steps=3, color_fix=None, **QUIET), expected)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 5), (11, 23)])
@pytest.mark.parametrize("color_fix", ["wavelet", "adain", None])
def test_any_size(model, size, color_fix):
    result = upscale(model, torch.rand(3, *size), tile=64, num_inference_steps=1, color_fix=color_fix, **QUIET)
    assert result.shape == (3, 4 * size[0], 4 * size[1]) and result.dtype == torch.float32
    assert result.isfinite().all() and result.min() >= 0 and result.max() <= 1


def test_seed_decides(model):
    image = torch.rand(3, 12, 20)
    options = {"tile": 48, "overlap": 16, "num_inference_steps": 2, "color_fix": None, **QUIET}
    first, again, other = (upscale(model, image, seed=seed, **options) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_no_gradient_and_the_model_stays_itself(model):
    before = dict(vars(model))
    image = torch.rand(3, 12, 20).requires_grad_()
    assert not upscale(model, image, tile=48, num_inference_steps=1, **QUIET).requires_grad
    assert vars(model) == before


def test_progress_counts_steps(model, capsys):
    upscale(model, torch.rand(3, 4, 4), num_inference_steps=3)
    assert "3/3" in capsys.readouterr().err
    upscale(model, torch.rand(3, 4, 4), num_inference_steps=3, progress=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("image", "options", "error", "message"),
    [
        (torch.rand(1, 3, 4, 4), {}, ValueError, r"image must have shape \[3, h, w\] .* got \[1, 3, 4, 4\]"),
        (torch.rand(1, 4, 4), {}, ValueError, r"image must have shape .* got \[1, 4, 4\]"),
        (torch.rand(3, 0, 4), {}, ValueError, r"at least one pixel, got \[3, 0, 4\]"),
        (torch.ones(3, 4, 4, dtype=torch.uint8), {}, TypeError, "image must be floating point .* got torch.uint8"),
        (torch.full((3, 4, 4), math.nan), {}, ValueError, "image must be finite and in .* from nan to nan"),
        (torch.full((3, 4, 4), 255.0), {}, ValueError, "image must be finite and in .* from 255 to 255"),
        (torch.rand(3, 4, 4), {"color_fix": "hsv"}, ValueError, "color_fix must be one of .* got 'hsv'"),
        (torch.rand(3, 4, 4), {"tile": 32, "overlap": 32}, ValueError, "overlap must be .* smaller than tile"),
        (torch.rand(3, 4, 4), {"overlap": -8}, ValueError, "overlap must be at least 0 .* got overlap -8"),
        (torch.rand(3, 4, 4), {"prompt": ["cat"]}, TypeError, r"prompt must be one text, got \['cat'\]"),
        (torch.rand(3, 4, 4), {"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
    ],
)
def test_rejects(model, image, options, error, message):
    with pytest.raises(error, match=message):
        upscale(model, image, **options, **QUIET)


# -- padding and colors ----------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 12), st.integers(0, 12))
def test_padding_keeps_the_image_and_invents_no_color(height, width, below, right):
    image = torch.rand(1, 3, height, width)
    padded = _pad(image, height + below, width + right)
    assert padded.shape == (1, 3, height + below, width + right)
    assert torch.equal(padded[..., :height, :width], image)
    assert set(padded[0, 0].flatten().tolist()) <= set(image[0, 0].flatten().tolist())


def test_padding_reflects_where_it_can():
    row = torch.tensor([1.0, 2, 3, 4]).expand(1, 1, 2, 4)
    assert _pad(row, 2, 6)[0, 0, 0].tolist() == [1, 2, 3, 4, 3, 2]
    assert _pad(row, 2, 8)[0, 0, 0].tolist() == [1, 2, 3, 4, 4, 4, 4, 4]


def smooth(seed):
    coarse = torch.rand(1, 3, 2, 2, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, size=(96, 96), mode="bicubic", align_corners=True)


def test_adain_takes_the_statistics_of_the_reference():
    image, reference = torch.rand(1, 3, 96, 96) * 0.3, smooth(0)
    fixed = adain_color_fix(image, reference)
    torch.testing.assert_close(fixed.mean((2, 3)), reference.mean((2, 3)))
    torch.testing.assert_close(fixed.std((2, 3)), reference.std((2, 3)), rtol=1e-3, atol=1e-3)
    correlation = torch.corrcoef(torch.stack([fixed[0, 0].flatten(), image[0, 0].flatten()]))[0, 1]
    assert correlation > 0.9999


@pytest.mark.parametrize("fix", [adain_color_fix, wavelet_color_fix])
def test_color_fixes_undo_a_cast_and_leave_a_good_image_alone(fix):
    image = smooth(1) + 0.05 * torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(fix(image, image), image, atol=1e-5, rtol=0)
    cast = image + torch.tensor([0.2, 0.0, -0.1]).reshape(1, 3, 1, 1)
    untouched = cast.clone()
    torch.testing.assert_close(fix(cast, image), image, atol=1e-3, rtol=0)
    assert torch.equal(cast, untouched)
    assert fix(cast, image, inplace=True) is cast
    torch.testing.assert_close(cast, image, atol=1e-3, rtol=0)


@pytest.mark.parametrize("fix", [adain_color_fix, wavelet_color_fix])
def test_color_fixes_go_band_by_band(fix, monkeypatch):
    image, reference = torch.rand(1, 3, 150, 40), torch.rand(1, 3, 160, 48)
    whole = fix(image, reference[..., :150, :40])
    monkeypatch.setattr("rfsr_ext.sampling.color._BAND", 40)
    torch.testing.assert_close(fix(image, reference), whole, atol=1e-5, rtol=0)


def test_wavelet_fix_keeps_the_detail_and_drops_its_own_shading():
    detail = torch.zeros(1, 3, 96, 96)
    detail[..., ::2] = 0.1
    detail[..., 1::2] = -0.1  # the finest wave there is
    fixed = wavelet_color_fix(smooth(3) + detail, smooth(4))
    assert (fixed - detail - smooth(4))[..., 16:-16, 16:-16].abs().mean() < 0.35 * (smooth(3) - smooth(4)).abs().mean()
    wave = fixed[..., 16:-16, 16:-16:2] - fixed[..., 16:-16, 17:-16:2]
    torch.testing.assert_close(wave.mean(), torch.tensor(0.2), atol=1e-2, rtol=0)
