"""What every test may use: a device parameter whose CUDA half skips, with a reason, where there is no GPU."""

import pytest
import torch


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    reason = "no GPU" if torch.version.cuda else f"torch {torch.__version__} was built without CUDA"
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason=f"needs a CUDA GPU: {reason}"))


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request):
    return request.param


@pytest.fixture
def no_weights(monkeypatch, tmp_path):
    """No published weights that this machine may have are found."""
    monkeypatch.delenv("RFSR_WEIGHTS", raising=False)
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "hub"))
