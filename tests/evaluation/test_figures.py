import io

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from rfsr_ext.evaluation import comparison_figure, curves_figure, trajectory_figure
from rfsr_ext.sampling import TimestepWindows


def rendered(figure: Figure) -> np.ndarray:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return np.asarray(Image.open(buffer).convert("RGB"))


def find(picture: np.ndarray, tile: np.ndarray) -> int:
    """How often ``tile`` occurs in ``picture``, pixel for pixel, one gray level of rounding allowed."""
    h, w = tile.shape[:2]
    corners = np.argwhere(np.abs(picture[: -h + 1, : -w + 1] - tile[0, 0]).max(-1) <= 1)
    return sum(np.abs(picture[y : y + h, x : x + w] - tile).max() <= 1 for y, x in corners)


def test_comparison_shows_every_pixel_as_a_square():
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(3, n, n, generator=generator) for n in (16, 64, 64)]
    figure = comparison_figure([[(image, "caption") for image in images]] * 2, ["LR", "SR", "GT"])
    picture = rendered(figure)
    for image in images:
        zoom = 320 // image.shape[-1]
        tile = (image.permute(1, 2, 0).numpy() * 255).round().astype(int).repeat(zoom, 0).repeat(zoom, 1)
        assert find(picture.astype(int), tile) == 2
    assert picture.shape[1] < 3 * 320 + 40 and picture.shape[0] < 2 * (320 + 30) + 50  # no wasted margins


def test_comparison_texts():
    image = torch.rand(3, 32, 32)
    figure = comparison_figure([[(image, "24.1 dB"), (image, "")]], ["base", "fine-tuned"])
    assert {text.get_text() for text in figure.texts} - {""} == {"24.1 dB", "base", "fine-tuned"}


def test_comparison_takes_any_tensor_a_model_gives():
    image = (torch.randn(3, 32, 32) * 2).requires_grad_()  # outside [0, 1], in a graph
    assert rendered(comparison_figure([[(image, "")]], ["wild"], tile=64)).shape[1] == 64 + 12


def test_comparison_rejects():
    image = torch.rand(3, 32, 32)
    with pytest.raises(ValueError, match=r"rows must hold 2 pictures each, one per title, got \[1\]"):
        comparison_figure([[(image, "")]], ["a", "b"])
    with pytest.raises(ValueError, match=r"rows must hold 1 pictures each, one per title, got \[\]"):
        comparison_figure([], ["a"])
    with pytest.raises(ValueError, match="pictures of 32x32 pixels or a whole factor less, got"):
        comparison_figure([[(image, ""), (torch.rand(3, 20, 20), "")]], ["a", "b"])


def history():
    n = 80
    rng = np.random.default_rng(0)
    window = np.where(np.arange(n) % 3 == 0, "reward", "structure")
    frame = pd.DataFrame({"iteration": np.arange(1, n + 1), "step": 5, "window": window})
    frame["loss/dwt"] = np.where(window == "structure", rng.random(n), np.nan)
    frame["loss/reward"] = np.where(window == "reward", rng.random(n), np.nan)
    frame["gradient norm"] = rng.random(n)
    frame["never"] = np.nan
    held_out = pd.DataFrame({"iteration": [0, 40, 80], "held-out PSNR": [23.0, 23.2, 23.1]})
    return pd.concat([frame, held_out], ignore_index=True)


def test_curves():
    figure = curves_figure(history())
    panels = {axes.get_title(loc="left"): axes for axes in figure.axes if axes.get_visible()}
    assert list(panels) == ["loss/dwt", "loss/reward", "gradient norm", "held-out PSNR"]
    assert [len(axes.lines) for axes in panels.values()] == [1, 1, 2, 1]  # both windows only where both have values
    np.testing.assert_array_equal(panels["held-out PSNR"].lines[0].get_ydata(), [23.0, 23.2, 23.1])
    (points,) = panels["loss/dwt"].collections
    (line,) = panels["loss/dwt"].lines
    raw = points.get_offsets()[:, 1]
    assert len(raw) == 53 and np.std(line.get_ydata()) < 0.6 * np.std(raw)
    assert [text.get_text() for text in figure.legends[0].texts] == ["structure window", "reward window"]
    assert rendered(figure).std() > 0


def test_curves_of_chosen_columns_and_without_windows():
    frame = history().drop(columns="window")
    figure = curves_figure(frame, ["gradient norm"])
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["gradient norm"]
    assert not figure.legends


@pytest.mark.parametrize("iterations", [1, 2])
def test_curves_of_a_run_that_just_began(iterations):
    assert rendered(curves_figure(history().head(iterations))).std() > 0


def test_curves_reject():
    with pytest.raises(ValueError, match=r"history must have a column 'iteration', got \['loss'\]"):
        curves_figure(pd.DataFrame({"loss": [1.0]}))
    with pytest.raises(ValueError, match="history must hold at least one quantity that was measured, got none"):
        curves_figure(pd.DataFrame({"iteration": [1], "loss": [np.nan]}))


def trajectory_frame():
    rng = np.random.default_rng(0)
    return pd.DataFrame([
        {"model": "base", "image": i, "seed": s, "step": st, "timestep": 1001 - 20 * st,
         "low_ssim": 0.7996 - 0.001 * abs(st - 12) + 0.001 * i,
         "high_ssim": 0.7 - 0.002 * abs(st - 4) + 0.001 * rng.random(),
         "psnr": 23.0}
        for i in range(4) for s in range(2) for st in range(1, 51)
    ])  # fmt: skip


def test_trajectory_marks_the_best_step_and_the_windows():
    figure = trajectory_figure(trajectory_frame(), TimestepWindows.from_steps(20, 40, 50))
    low, high = figure.axes
    assert low.get_legend().texts[0].get_text() == "base: best at step 12 (0.801)"
    assert "best at step 4 (0.70" in high.get_legend().texts[0].get_text()
    (line,) = low.lines
    assert line.get_markevery() == [11] and len(line.get_xdata()) == 50
    spans = [patch.get_extents().transformed(low.transData.inverted()).intervalx for patch in low.patches]
    np.testing.assert_allclose(spans, [[0.5, 20.5], [40.5, 50.5]])
    assert {text.get_text() for text in low.texts} == {"structure", "reward"}
    # the band is one standard error of the four images: std of 0, 1, 2, 3 thousandths over 2
    heights = low.collections[0].get_paths()[0].vertices
    at_12 = heights[np.isclose(heights[:, 0], 12), 1]
    assert np.ptp(at_12) == pytest.approx(2 * np.std([0, 1, 2, 3], ddof=1) / 2 / 1000, rel=1e-6)
    assert rendered(figure).std() > 0


def test_trajectory_of_several_models_without_windows():
    frame = pd.concat([trajectory_frame(), trajectory_frame().assign(model="fine-tuned")])
    figure = trajectory_figure(frame)
    assert [len(axes.lines) for axes in figure.axes] == [2, 2]
    assert not figure.axes[0].patches


def test_figures_belong_to_no_window():
    from matplotlib import pyplot

    before = pyplot.get_fignums()
    curves_figure(history())
    trajectory_figure(trajectory_frame())
    assert pyplot.get_fignums() == before
