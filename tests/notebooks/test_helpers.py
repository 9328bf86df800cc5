"""rfsr_ext.notebook: what it draws, compares and refuses."""

import base64
import csv
import io
import re

import numpy as np
import pytest
import torch
from PIL import Image

from rfsr_ext.notebook import blind, caught, check, exercise, explore, panels, pictures, show, spoken, together

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


def test_a_loop_of_checks_prints_one_line(capsys):
    with together("all three"):
        for tolerance in (0, 0.25, 0.5):
            check("one", 1, 1, tolerance)
    check("after it", 1, 1, 0)
    with together("outer"), together("inner"):
        check("one", 1, 1, 0)
    assert capsys.readouterr().out.splitlines() == [
        "✓ all three · 3 comparisons, within 0.5",
        "✓ after it · exact",
        "✓ outer · 1 comparisons, exact",
    ]


def test_one_wrong_check_of_many_stops_with_its_name(capsys):
    with pytest.raises(AssertionError, match="^the second: max difference 1"), together("both"):
        check("the first", 1, 1, 0)
        check("the second", 1, 2, 0)
    check("later", 1, 1, 0)
    assert capsys.readouterr().out == "✓ later · exact\n", "what failed leaves nothing behind"
    with pytest.raises(AssertionError, match="^no rows: nothing was checked"), together("no rows"):
        for row in ():
            check("row", row, row, 0)


def test_titles_become_the_end_of_a_description():
    assert spoken(["truth\n", "step 3\n24 dB"]) == "truth; step 3, 24 dB."


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


def scenes(count=4, size=8):
    """Scenes with a reference, and a black, a gray and a white picture in each."""
    named = {"black": 0.0, "gray": 0.5, "white": 1.0}
    picture = {name: torch.full((3, size, size), value) for name, value in named.items()}
    return [(torch.full((3, size // 4, size // 4), 0.25), picture)] * count


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def seen(box):
    """Gray values of what stands left, in the middle and right."""
    data = base64.b64decode(re.search('base64,([^"]+)', box.panel.value)[1])
    line = np.asarray(Image.open(io.BytesIO(data)).convert("L"))[-12]
    width = (len(line) - 8) // 3
    return [round(int(line[width // 2 + 8 + k * width]) / 255, 1) for k in range(3)]


def test_what_is_seen_is_what_is_noted(tmp_path):
    path, value = tmp_path / "votes.csv", {"black": 0.0, "gray": 0.5, "white": 1.0}
    box = blind(scenes(), path)
    assert not path.exists(), "made by the first answer"
    for number in range(12):
        assert f">{number + 1} of 12: Which is better?</p>" in box.panel.value
        assert not re.search("black|gray|white", re.sub('base64,[^"]+|<style>.+</style>', "", box.panel.value))
        left, middle, right = seen(box)
        (box.left, box.right)[left < right].click()  # always the lighter one
        row = rows(path)[number]
        assert (value[row["left"]], middle, value[row["right"]]) == (left, 0.2, right)
        assert value[row["chosen"]] == max(left, right)
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", row["time"]) and row["who"] == "reader"
    assert ">all 12 pairs are answered, thank you</p>" in box.panel.value and "<img" not in box.panel.value
    assert box.left.disabled and box.right.disabled
    box.left.click()
    assert len(rows(path)) == 12, "one press too many is no answer"
    found = sorted(((int(row["pair"]), {row["left"], row["right"]}) for row in rows(path)), key=lambda pair: pair[0])
    combined = [{"black", "gray"}, {"black", "white"}, {"gray", "white"}]
    assert found == [(n, combined[n % 3]) for n in range(12)], "each pair once"


def test_order_and_sides_are_random_by_seed_and_person(tmp_path):
    def answers(**options):
        path = tmp_path / f"{options}.csv"
        box = blind(scenes(), path, **options)
        for _ in range(12):
            box.left.click()
        return [(row["pair"], row["left"]) for row in rows(path)]

    first = answers()
    assert first == answers(who="reader") and first != answers(seed=1) and first != answers(who="Ada")
    assert [pair for pair, _ in first] != sorted(pair for pair, _ in first)
    lighter = sum({"black": 0, "gray": int(pair) % 3 == 0, "white": 1}[name] for pair, name in first)
    assert 0 < lighter < 12, "the lighter one stands on both sides"


def test_an_interrupted_session_goes_on(tmp_path):
    path = tmp_path / "votes.csv"
    box = blind(scenes(), path)
    for _ in range(5):
        box.right.click()
    before = path.read_text()
    again, other = blind(scenes(), path, seed=3), blind(scenes(), path, who="Ada")
    assert ">6 of 12: " in again.panel.value and ">1 of 12: " in other.panel.value
    for _ in range(7):
        again.left.click()
    other.left.click()
    assert path.read_text().startswith(before)
    assert sorted(int(row["pair"]) for row in rows(path) if row["who"] == "reader") == list(range(12))
    assert ">all 12 " in blind(scenes(), path).panel.value
    assert repr(again) == repr(blind(scenes(), path)) == "12 pairs to choose from; run this notebook to choose"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"a,b\n1,2\n", r"^path must be a CSV file with the columns .* with \['a', 'b'\]; give another path$"),
        (b"", r"^path must be a CSV file with the columns .* with \[\]"),
        (b"\xff\xd8\x00\xff", "^path must be a CSV file with the columns"),
        (b"time,who,pair,left,right,chosen\nt,w,12,black,gray,gray\n", "^path must hold answers to these 12 pairs"),
        (b"time,who,pair,left,right,chosen\nt,w,0,black,red,red\n", "in line 2 of"),
        (b"time,who,pair,left,right,chosen\nt,w,0,black,gray,white\n", "in line 2 of"),
        (b"time,who,pair,left,right,chosen\nt,w,0,black\n", "in line 2 of"),
    ],
)
def test_a_file_of_others_is_refused_and_left_alone(tmp_path, content, says):
    path = tmp_path / "votes.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=says):
        blind(scenes(), path)
    assert path.read_bytes() == content


def test_a_pair_needs_two_pictures_of_one_size(tmp_path):
    pictures = [torch.zeros(3, 8, 8), torch.zeros(3, 4, 4)]
    with pytest.raises(ValueError, match=r"^scene 1 must have .* got 2 of size \(3, 4, 4\) and \(3, 8, 8\); leave"):
        blind([*scenes(1), (None, dict(zip("ab", pictures, strict=True)))], tmp_path / "votes.csv")
    with pytest.raises(ValueError, match="^scene 0 must have two or more pictures of one size, got 1 of size"):
        blind([(None, {"a": pictures[0]})], tmp_path / "votes.csv")
