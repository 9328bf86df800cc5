"""SwinIR against DiffBIR's own class (fixture), and what its files may and may not hold."""

import pytest
import torch

from rfsr_ext.networks.swinir import SwinIR
from tests.models.released.diffbir.fixture import EXPECTED, KEYS, weights
from tests.models.released.diffbir.inputs import tell


def small() -> SwinIR:
    tensors = weights("swinir")
    network = SwinIR(**SwinIR.config_of(tensors))
    network.load_state_dict(tensors)
    return network.eval()


@torch.no_grad()
def test_equals_the_public_code():
    """40x72 pixels: padded to 64x128, so windows of another number than the stored masks'."""
    output = small()(EXPECTED["swinir.image"])
    torch.testing.assert_close(
        output, EXPECTED["swinir.output"], rtol=0, atol=1e-5 * EXPECTED["swinir.output"].abs().max()
    )


@torch.no_grad()
def test_stored_masks_are_those_it_makes_itself():
    network, x = small(), torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    stored = network(x)  # 16x16 features, as many as the masks are for
    for block in (block for layer in network.layers for block in layer.residual_group.blocks):
        block.img_size = 0
    assert torch.equal(network(x), stored)


def test_full_size_has_the_names_of_the_public_class():
    with torch.device("meta"):
        network = SwinIR()
    shapes = {n: list(t.shape) for n, t in network.state_dict().items()}
    assert tell(shapes, sum(p.numel() for p in network.parameters())) == KEYS["full"]["swinir"]


@pytest.mark.parametrize(
    "options", [{"scale": 4, "depths": [1, 3], "num_heads": [2, 4]}, {"img_size": 8}, {"window_size": 4}]
)
def test_configuration_is_read_from_shapes(options):
    network = SwinIR(**{"embed_dim": 8, "depths": [2], "num_heads": [2], "hidden_dim": 12} | options)
    read = SwinIR.config_of(network.state_dict())
    assert read == {name: network.config[name] for name in read}
    assert network(torch.rand(1, 3, 32, 40)).shape == (1, 3, 32, 40)


def test_a_folder_keeps_it(tmp_path):
    small().save_pretrained(tmp_path)
    again, x = SwinIR.from_pretrained(tmp_path), torch.rand(1, 3, 64, 64)
    assert torch.equal(again(x), small()(x))


def test_another_model_is_refused():
    with pytest.raises(
        ValueError, match=r"SwinIR with a pixel unshuffle must have a tensor 'conv_first\.1\.weight', got"
    ):
        SwinIR.config_of({n: t for n, t in weights("swinir").items() if not n.startswith("conv_first")})
    with pytest.raises(ValueError, match=r"must have a tensor 'layers\.0\.residual_group"):
        SwinIR.config_of(weights("rrdbnet"))
