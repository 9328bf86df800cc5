"""What every test may use: a device parameter, whose CUDA half stands for itself by one row where there is no GPU."""

import pytest
import torch


def pytest_collection_modifyitems(config, items):
    """Where there is no GPU, one row of each test that wants one stays and skips; all others are not in the list."""
    if torch.cuda.is_available():
        return
    reason = "no GPU" if torch.version.cuda else f"torch {torch.__version__} was built without CUDA"
    first = {item.function: item for item in reversed(items) if item.get_closest_marker("cuda")}
    left_out = []
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason=f"needs a CUDA GPU: {reason}"))
            if item is not first[item.function]:
                left_out.append(item)
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request):
    return request.param


@pytest.fixture
def no_weights(monkeypatch, tmp_path):
    """No published weights that this machine may have are found."""
    monkeypatch.delenv("RFSR_WEIGHTS", raising=False)
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "hub"))
