"""Inputs for the operator tests: every memory layout, and one seed."""

import pytest
import torch


def _sliced(x):
    n, c, h, w = x.shape
    wide = torch.full((n, c + 1, h + 2, 2 * w + 1), float("nan"), dtype=x.dtype, device=x.device)
    view = wide[:, 1:, 1 : h + 1, 1 : 2 * w + 1 : 2]
    view.copy_(x)
    return view


def _offset(x):  # contiguous, but beginning beside a boundary of 16 bytes
    view = x.new_full((x.numel() + 1,), float("nan"))[1:].view(x.shape)
    return view.copy_(x)


def _expanded(x):  # stride 0: the same image for the whole batch
    return x[:1].contiguous().expand(x.shape)


LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "sliced": _sliced,
    "offset": _offset,
    "expanded": _expanded,
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
}


@pytest.fixture(scope="session", params=LAYOUTS)
def layout(request):
    """A function that returns a tensor of the same shape in another memory layout (``expanded`` changes values)."""
    return LAYOUTS[request.param]


@pytest.fixture(scope="session")
def layouts():
    return LAYOUTS


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
