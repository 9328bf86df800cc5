"""RRDBNet against DiffBIR's copy of BSRNet (fixture)."""

import pytest
import torch

from rfsr_ext.networks.rrdbnet import RRDBNet
from tests.models.released.diffbir.fixture import EXPECTED, KEYS, weights
from tests.models.released.diffbir.inputs import tell


def small() -> RRDBNet:
    tensors = weights("rrdbnet", scale=1.5)
    network = RRDBNet(**RRDBNet.config_of(tensors))
    network.load_state_dict(tensors)
    return network.eval()


@torch.no_grad()
def test_equals_the_public_code():
    output = small()(EXPECTED["rrdbnet.image"])
    torch.testing.assert_close(
        output, EXPECTED["rrdbnet.output"], rtol=0, atol=1e-5 * EXPECTED["rrdbnet.output"].abs().max()
    )


def test_full_size_has_the_names_of_the_public_class():
    with torch.device("meta"):
        network = RRDBNet()
    shapes = {n: list(t.shape) for n, t in network.state_dict().items()}
    assert tell(shapes, sum(p.numel() for p in network.parameters())) == KEYS["full"]["rrdbnet"]


@pytest.mark.parametrize("options", [{"scale": 2}, {"num_blocks": 3, "growth": 2}, {"channels": 12}])
def test_configuration_is_read_from_shapes(options):
    network = RRDBNet(**{"channels": 8, "num_blocks": 1, "growth": 4} | options)
    read = RRDBNet.config_of(network.state_dict())
    assert read == {name: network.config[name] for name in read}
    assert network(torch.rand(1, 3, 3, 5)).shape == (1, 3, 3 * read["scale"], 5 * read["scale"])


def test_a_folder_keeps_it(tmp_path):
    small().save_pretrained(tmp_path)
    again, x = RRDBNet.from_pretrained(tmp_path), torch.rand(1, 3, 5, 5)
    assert torch.equal(again(x), small()(x))


def test_another_model_is_refused():
    with pytest.raises(ValueError, match=r"an RRDBNet must have a tensor 'conv_first\.weight', got a file without it"):
        RRDBNet.config_of(weights("swinir"))
