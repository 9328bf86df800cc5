"""rfsr_ext.notebook: what it draws, compares and refuses."""

import base64
import io
import re

import numpy as np
import pytest
import torch
from PIL import Image

from rfsr_ext.notebook import caught, check, exercise, explore, panels, pictures, show

ALT = "A line through 2 points, long enough to be worth hearing."


def drawing():
    figure, axes = panels()
    axes.plot([1, 2])
    return figure


def shown(monkeypatch, *args, **options):
    bundles = []
    monkeypatch.setattr("IPython.display.display", lambda bundle, raw: bundles.append(bundle))
    show(*args, **options)
    return bundles[0]


def test_a_figure_carries_its_description_twice(monkeypatch):
    bundle = shown(monkeypatch, drawing(), ALT + ' "quoted" & <odd>', width=321)
    assert bundle["text/plain"] == ALT + ' "quoted" & <odd>'
    assert (
        'alt="A line through 2' in bundle["text/html"] and "&quot;quoted&quot; &amp; &lt;odd&gt;" in bundle["text/html"]
    )
    assert "width:321px" in bundle["text/html"]


@pytest.mark.parametrize("alt", ["too short 1", "long enough it is, but no number is in it at all"])
def test_a_description_must_say_something(alt):
    with pytest.raises(ValueError, match="^alt must say"):
        show(drawing(), alt)


def test_pictures_are_stored_without_loss(monkeypatch):
    image = torch.rand(3, 110, 110, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    bundle = shown(monkeypatch, pictures([image], ["noise"], tile=3.3), ALT)
    data = base64.b64decode(re.search('base64,([^"]+)', bundle["text/html"])[1])
    assert len(data) <= 200_000
    drawn = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    wanted = (image.movedim(0, -1).numpy() * 255).round().repeat(3, 0).repeat(3, 1)
    bottom = drawn.shape[0] - 8
    assert np.abs(drawn[bottom - 330 : bottom, 8:338] - wanted).max() <= 1, "every pixel a square of 3 by 3"


def test_noise_that_fits_nowhere_is_refused():
    image = torch.rand(3, 400, 400, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="^figure must take at most 200000 bytes"):
        show(pictures([image, image], ["a", "b"], tile=4), ALT)


def test_check_prints_one_quiet_line(capsys):
    check("same", [1, 2], torch.tensor([1, 2]), 0)
    check("near", np.float32(1.5), 1.25, 0.25)
    assert capsys.readouterr().out.splitlines() == [
        "✓ same · exact",
        "✓ near · within 0.25",
    ]


@pytest.mark.parametrize(
    ("ours", "theirs", "says"),
    [(1.0, 1.2, "max difference 0.2, allowed 0.1"), (float("nan"), 0.0, "nan"), ([1, 2], [1, 2, 3], "shapes differ")],
)
def test_check_refuses(ours, theirs, says):
    with pytest.raises(AssertionError, match=says):
        check("x", ours, theirs, 0.1)


def test_caught_wants_a_failing_check(capsys):
    caught(lambda: check("x", 1, 2, 0))
    assert capsys.readouterr().out == "caught: x: max difference 1, allowed 0\n"
    with pytest.raises(RuntimeError, match="no check noticed"):
        caught(lambda: check("x", 1, 1, 0))


def test_exercises_never_raise(capsys):
    def stub():
        raise NotImplementedError

    exercise(1, stub)
    exercise(2, lambda: check("x", 1, 2, 0))
    exercise(3, lambda: undefined)  # noqa: F821
    exercise(4, lambda: None)
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "exercise 1: open" and out[3] == "exercise 4: correct"
    assert out[1].startswith("exercise 2: not yet (AssertionError") and "NameError" in out[2]


def test_a_slider_redraws_its_panel():
    calls = []

    def draw(position):
        calls.append(position)
        return drawing(), f"{ALT} It stands at {position}."

    box = explore(draw, values=[1, 2, 3], label="position", start=2)
    assert "It stands at 2." in box.panel.value
    box.slider.value = 3
    assert 'alt="' in box.panel.value and "It stands at 3." in box.panel.value
    box.slider.value = 2
    assert calls == [2, 3], "a position is drawn once"
    assert repr(box) == "slider 'position' with 3 positions; run this notebook to move it"
