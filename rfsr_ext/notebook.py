"""What the course's notebooks share: figures that say what they show, comparisons, exercises, two kinds of widget."""

import base64
import csv
import datetime
import html
import io
import itertools
import math
import os
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

__all__ = [
    "COLORS", "blind", "caught", "check", "exercise", "explore", "panels", "pictures", "show", "spoken", "together",
]  # fmt: skip

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
"""Okabe and Ito's palette, darkest contrasts first: told apart with every common color blindness."""

_DPI = 100
_MOST_BYTES = 200_000
_VOTE = ["time", "who", "pair", "left", "right", "chosen"]
_gathered: list[list[float]] = []  # tolerances of the checks that passed, for each open `together`
_FOCUS = "<style>.rfsr-blind .jupyter-button:focus:enabled {outline: 3px solid #0072B2; outline-offset: -3px}</style>"


def panels(rows: int = 1, columns: int = 1, width: float = 7.2, height: float = 2.6, **options):
    """A `Figure` that belongs to no window, with ``rows`` × ``columns`` axes in the course's style.

    Args:
        rows, columns: of axes.
        width, height: of the whole figure, in inches.
        options: for `Figure.subplots`, such as ``sharey=True``.

    Returns:
        ``(figure, axes)``: one `Axes` for a single panel, else an array of them.
    """
    figure = Figure(figsize=(width, height), dpi=_DPI, facecolor="white", layout="constrained")
    axes = figure.subplots(rows, columns, **options)
    for panel in np.ravel(axes):
        panel.set_prop_cycle(color=COLORS, linestyle=["-", "--", "-.", ":", "-", "--", "-."])
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=9)
        panel.title.set_size(10)
    return figure, axes


def pictures(
    images: Sequence, titles: Sequence[str], columns: int | None = None, tile: float = 1.75, span=(0, 1)
) -> Figure:
    """A row or grid of pictures, every pixel a square of whole screen pixels, none smoothed.

    Args:
        images: tensors ``[3, H, W]`` in color or ``[H, W]`` in gray; sizes may differ by whole factors.
        titles: one per picture, above it.
        columns: pictures per row; all of them by default.
        tile: about how wide a picture becomes, in inches.
        span: the values drawn black and white; others are clipped.

    Returns:
        The `Figure`.
    """
    columns = columns or len(images)
    rows = -(-len(images) // columns)
    height, width = (max(image.shape[axis] for image in images) for axis in (-2, -1))
    zoom = max(1, round(tile * _DPI / width))
    height, width, gap = height * zoom, width * zoom, 8
    head = 6 + 15 * max(title.count("\n") + 1 for title in titles)
    whole_width, whole_height = gap + columns * (width + gap), rows * (head + height) + gap
    figure = Figure(figsize=(whole_width / _DPI, whole_height / _DPI), dpi=_DPI, facecolor="white")
    low, high = span
    for place, (image, title) in enumerate(zip(images, titles, strict=True)):
        left, top = gap + place % columns * (width + gap), head + place // columns * (head + height)
        box = left / whole_width, 1 - (top + height) / whole_height, width / whole_width, height / whole_height
        axes = figure.add_axes(box)
        pixels = ((image.detach().cpu().float() - low) / (high - low)).clamp(0, 1)
        pixels = pixels.movedim(0, -1) if image.ndim == 3 else pixels
        axes.imshow(pixels, cmap="gray", vmin=0, vmax=1, interpolation="nearest", aspect="auto")
        axes.set_axis_off()
        axes.set_title(title, size=9, pad=3)
    return figure


def _picture(figure: Figure, most: float) -> str:
    """The figure as a data URI: PNG or WebP, whichever is smaller, without loss: its pixels are what is compared."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    image, files = Image.open(buffer).convert("RGB"), {}
    for form, options in {"png": {"optimize": True}, "webp": {"lossless": True, "method": 6}}.items():
        buffer = io.BytesIO()
        image.save(buffer, form, **options)
        files[form] = buffer.getvalue()
    form, data = min(files.items(), key=lambda item: len(item[1]))
    if len(data) > most:
        raise ValueError(f"figure must take at most {most} bytes, got {len(data)}; make it or its pictures smaller")
    return f"data:image/{form};base64,{base64.b64encode(data).decode()}"


def _html(figure: Figure, alt: str, width: int | None = None, most: float = _MOST_BYTES) -> str:
    if len(alt) < 40 or not re.search(r"\d", alt):
        raise ValueError(f"alt must say in 40 characters or more, with a number, what the figure shows, got {alt!r}")
    pixels = round(figure.get_figwidth() * _DPI) if width is None else width
    return (
        f'<figure style="margin:0"><img alt="{html.escape(alt, quote=True)}" src="{_picture(figure, most)}" '
        f'style="width:{pixels}px;max-width:100%"></figure>'
    )


def show(figure: Figure, alt: str, width: int | None = None) -> None:
    """Display a figure with a description that screen readers speak and that tests compare.

    Args:
        figure: a `matplotlib.figure.Figure`.
        alt: what is to be seen, in 40 characters or more, with numbers taken from the plotted arrays.
        width: in pixels; the figure's own by default.

    Raises:
        ValueError: if ``alt`` is too short or has no number, or the picture takes more than 200 kB.
    """
    from IPython.display import display

    display({"text/html": _html(figure, alt, width), "text/plain": alt}, raw=True)


def spoken(titles: Iterable[str]) -> str:
    """Titles of pictures as the end of a description: their lines joined by commas, the titles by semicolons."""
    return "; ".join(title.strip().replace("\n", ", ") for title in titles) + "."


def _array(values) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().double()
    return np.asarray(values, dtype=np.float64)


def check(name: str, ours, theirs, tolerance: float) -> None:
    """Compare two results and print one quiet line if they agree; an error says how far apart they are.

    Args:
        name: what is compared, for the printed line.
        ours, theirs: tensors, arrays or numbers of one shape.
        tolerance: largest absolute difference allowed; 0 asks for equality.

    Raises:
        AssertionError: if shapes differ, a value is not finite, or a difference exceeds ``tolerance``.
    """
    ours, theirs = _array(ours), _array(theirs)
    if ours.shape != theirs.shape:
        raise AssertionError(f"{name}: shapes differ, {list(ours.shape)} and {list(theirs.shape)}")
    difference = np.abs(ours - theirs).max(initial=0.0)
    if not difference <= tolerance:  # also catches NaN
        raise AssertionError(f"{name}: max difference {difference:.3g}, allowed {tolerance:g}")
    if _gathered:
        _gathered[-1].append(tolerance)
    else:
        print(f"✓ {name} · {_nearness(tolerance)}")


def _nearness(tolerance: float) -> str:
    return "exact" if tolerance == 0 else f"within {tolerance:g}"


@contextmanager
def together(name: str) -> Iterator[None]:
    """One quiet line for all the checks of a loop, with their number and the largest of their tolerances.

    A check that fails stops the notebook with its own name, as it does alone.

    Args:
        name: what all of them compare, for the printed line.

    Raises:
        AssertionError: if nothing was checked: the loop was empty.
    """
    _gathered.append([])
    try:
        yield
    finally:
        tolerances = _gathered.pop()
    if not tolerances:
        raise AssertionError(f"{name}: nothing was checked")
    if _gathered:
        _gathered[-1].extend(tolerances)
    else:
        print(f"✓ {name} · {len(tolerances)} comparisons, {_nearness(max(tolerances))}")


def caught(bug: Callable[[], object]) -> None:
    """Run something wrong and print the check that noticed (its AssertionError or ValueError).

    Raises:
        RuntimeError: if none did.
    """
    try:
        bug()
    except (AssertionError, ValueError) as error:
        print(f"caught: {error}")
        return
    raise RuntimeError("no check noticed the bug")


def exercise(number: int, verify: Callable[[], object]) -> None:
    """Say whether an exercise is open, correct or not yet; never raises, so that *Run All* goes on.

    Args:
        number: of the exercise.
        verify: calls the reader's function, which raises `NotImplementedError` while it is a stub, and `check`\\ s it.
    """
    try:
        verify()
    except NotImplementedError:
        print(f"exercise {number}: open")
    except Exception as error:  # whatever the reader's code does wrong
        print(f"exercise {number}: not yet ({type(error).__name__}: {error})")
    else:
        print(f"exercise {number}: correct")


def explore(draw: Callable[[object], tuple[Figure, str]], values: Sequence, label: str, start=None):
    """A slider above a figure, redrawn at every position; works with keyboard and screen reader.

    Args:
        draw: a position to ``(figure, alt)``, depending on nothing else.
        values: the slider's positions.
        label: its name.
        start: first position shown; the first of ``values`` by default.

    Returns:
        The widget; its ``slider`` and ``panel`` are there for a program to move and to read.
    """
    import ipywidgets as widgets

    panel = widgets.HTML()
    slider = widgets.SelectionSlider(
        options=list(values), value=values[0] if start is None else start, description=label,
        continuous_update=False, style={"description_width": "initial"}, layout={"width": "440px"},
    )  # fmt: skip
    drawn: dict = {}

    def redraw(change=None) -> None:
        position = slider.value
        if position not in drawn:
            drawn[position] = draw(position)
        figure, alt = drawn[position]
        text = f'<p aria-live="polite" style="margin:0">{html.escape(alt)}</p>'
        panel.value = f'<div style="line-height:1.5">{_html(figure, alt)}{text}</div>'

    class Explorer(widgets.VBox):
        slider: widgets.SelectionSlider
        panel: widgets.HTML

        def __repr__(self) -> str:  # what stored notebooks show, where no kernel lives that could move it
            return f"slider {label!r} with {len(values)} positions; run this notebook to move it"

    slider.observe(redraw, "value")
    redraw()
    box = Explorer([slider, panel])
    box.slider, box.panel = slider.add_class("rfsr-slider"), panel.add_class("rfsr-panel")
    return box


def blind(
    scenes: Sequence[tuple[torch.Tensor | None, Mapping[str, torch.Tensor]]],
    path: str | os.PathLike,
    who: str = "reader",
    seed: int = 0,
    question: str = "Which is better?",
    tile: float = 2.5,
):
    """Ask which of two pictures is better, without their names: a pair at a time, below it the buttons left and right.

    Every two pictures of a scene make a pair.  The order of pairs and the sides are random.  Each answer becomes a row
    of a CSV file at once: ``time`` (UTC), ``who``, ``pair`` (its number by scenes, from 0), and the names ``left``,
    ``right`` and ``chosen``.  Pairs that ``who`` has answered there are not asked again, so an interrupted session goes
    on.  `rfsr_ext.evaluation.bradley_terry` makes strengths of such a table.  Tab reaches the buttons, Enter and Space
    press them.

    Args:
        scenes: for each a reference to show between the two, such as the low resolution, or None; and by name two or
            more pictures ``[3, H, W]`` in [0, 1] of one size.
        path: the CSV file, made by the first answer.
        who: who answers; another name gets an order and sides of its own.
        seed: of order and sides.
        question: below every pair.
        tile: about how wide a picture becomes, in inches.

    Returns:
        The widget; its ``left``, ``right`` and ``panel`` are there for a program to press and to read.

    Raises:
        ValueError: if a scene has fewer than two pictures or pictures of different sizes, or ``path`` holds something
            else than answers to these pairs.
    """
    import ipywidgets as widgets

    pairs = []
    for number, (reference, named) in enumerate(scenes):
        sizes = sorted({tuple(picture.shape) for picture in named.values()})
        if len(named) < 2 or len(sizes) > 1:
            raise ValueError(
                f"scene {number} must have two or more pictures of one size, got {len(named)} of size "
                f"{' and '.join(map(str, sizes))}; leave it out, or enlarge all to one size"
            )
        pairs += [(reference, *two) for two in itertools.combinations(named.items(), 2)]
    answered = _answered(Path(path), [{a, b} for _, (a, _), (b, _) in pairs], who)
    draw = random.Random(f"{seed} {who}")
    order = draw.sample(range(len(pairs)), len(pairs))
    sides = {n: draw.sample(pairs[n][1:], 2) for n in order}
    waiting = [n for n in order if n not in answered]
    left, right = (widgets.Button(description=side) for side in ("left", "right"))
    panel = widgets.HTML()

    def ask() -> None:
        line, image = f"all {len(pairs)} pairs are answered, thank you", ""
        if waiting:
            (_, first), (_, second) = sides[waiting[0]]
            shown = {"left": first, "reference": pairs[waiting[0]][0], "right": second}
            shown = {title: picture for title, picture in shown.items() if picture is not None}
            line = f"{len(pairs) - len(waiting) + 1} of {len(pairs)}: {question}"
            alt = f"{line} One picture is on the left, one on the right."
            image = _html(pictures(list(shown.values()), list(shown), tile=tile), alt, most=math.inf)
        left.disabled = right.disabled = not waiting
        panel.value = f'{_FOCUS}{image}<p aria-live="polite" style="margin:0">{html.escape(line)}</p>'

    def answer(button) -> None:
        if not waiting:  # pressed twice before the button was disabled
            return
        (a, _), (b, _) = sides[waiting[0]]
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        _append(Path(path), [now, who, waiting[0], a, b, a if button is left else b])
        del waiting[0]
        ask()

    class Blind(widgets.VBox):
        left: widgets.Button
        right: widgets.Button
        panel: widgets.HTML

        def __repr__(self) -> str:  # the same however many are answered
            return f"{len(pairs)} pairs to choose from; run this notebook to choose"

    left.on_click(answer)
    right.on_click(answer)
    ask()
    box = Blind([panel, widgets.HBox([left, right])])
    box.left, box.right, box.panel = left, right, panel
    return box.add_class("rfsr-blind")


def _answered(path: Path, pairs: list[set[str]], who: str) -> set[int]:
    """Numbers of the pairs that ``who`` has answered in the file, if it is there."""
    if not path.exists():
        return set()
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        header, *rows = list(csv.reader(file)) or [[]]
    if header != _VOTE:
        raise ValueError(
            f"path must be a CSV file with the columns {_VOTE}, got {str(path)!r} with {header}; give another path"
        )
    numbers = {str(n): names for n, names in enumerate(pairs)}
    for line, row in enumerate(rows, 2):
        if len(row) != len(_VOTE) or numbers.get(row[2]) != set(row[3:5]) or row[5] not in row[3:5]:
            raise ValueError(
                f"path must hold answers to these {len(pairs)} pairs, got {row} in line {line} of {str(path)!r}; give "
                "another path"
            )
    return {int(row[2]) for row in rows if row[1] == who}


def _append(path: Path, row: list) -> None:
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([_VOTE, row] if new else [row])
