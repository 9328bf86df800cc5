import pytest
import torch

from tests.tiny import tiny_model


@pytest.fixture(scope="session")
def make_model():
    return tiny_model


@pytest.fixture
def model():
    return tiny_model()


@pytest.fixture(scope="session")
def lr():
    return torch.rand(2, 3, 8, 6, generator=torch.Generator().manual_seed(0))
