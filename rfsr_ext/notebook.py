"""What the course's notebooks share: figures that say what they show, comparisons, exercises, one kind of widget."""

import base64
import html
import io
import re
from collections.abc import Callable, Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

__all__ = ["COLORS", "caught", "check", "exercise", "explore", "panels", "pictures", "show"]

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
"""Okabe and Ito's palette, darkest contrasts first: told apart with every common color blindness."""

_DPI = 100
_MOST_BYTES = 200_000


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


def _picture(figure: Figure) -> str:
    """The figure as a data URI: PNG or WebP, whichever is smaller, without loss: its pixels are what is compared."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    image, files = Image.open(buffer).convert("RGB"), {}
    for form, options in {"png": {"optimize": True}, "webp": {"lossless": True, "method": 6}}.items():
        buffer = io.BytesIO()
        image.save(buffer, form, **options)
        files[form] = buffer.getvalue()
    form, data = min(files.items(), key=lambda item: len(item[1]))
    if len(data) > _MOST_BYTES:
        raise ValueError(
            f"figure must take at most {_MOST_BYTES} bytes, got {len(data)}; make it or its pictures smaller"
        )
    return f"data:image/{form};base64,{base64.b64encode(data).decode()}"


def _html(figure: Figure, alt: str, width: int | None = None) -> str:
    if len(alt) < 40 or not re.search(r"\d", alt):
        raise ValueError(f"alt must say in 40 characters or more, with a number, what the figure shows, got {alt!r}")
    pixels = round(figure.get_figwidth() * _DPI) if width is None else width
    return (
        f'<figure style="margin:0"><img alt="{html.escape(alt, quote=True)}" src="{_picture(figure)}" '
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
    print(f"✓ {name} · " + ("exact" if tolerance == 0 else f"within {tolerance:g}"))


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
