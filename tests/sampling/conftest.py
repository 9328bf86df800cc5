import pytest
import torch

from rfsr_ext.mini import architecture
from rfsr_ext.models import ControlNetISRModel, Recipe
from tests.tiny import sd_scheduler, tiny_tokenizer


@pytest.fixture(scope="session")
def model():
    """The mini model's architecture with random weights, of 10 steps."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokenizer = tiny_tokenizer()
        unet, controlnet = architecture.denoiser()
        for parameter in controlnet.parameters():
            if not parameter.any():  # zero convolutions, which would hide the condition
                torch.nn.init.normal_(parameter, std=0.05)
        return ControlNetISRModel(
            architecture.autoencoder(), architecture.text_encoder(tokenizer), tokenizer, unet, controlnet,
            sd_scheduler(), recipe=Recipe(num_inference_steps=10),
        )  # fmt: skip


@pytest.fixture(scope="session")
def condition(model):
    lr = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return model.condition(lr, ["cat", "", "flower, petals"])
