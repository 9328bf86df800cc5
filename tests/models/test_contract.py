"""What every base model satisfies. A new model joins with one line in MODELS."""

import copy

import pytest
import torch

from rfsr_ext.memory import hold_weights
from rfsr_ext.models import check_model, load_model
from rfsr_ext.sampling import generators, sample, upscale
from tests.models.released.reduced import REDUCED
from tests.once import built_once
from tests.tiny import PixelModel, tiny_model

MODELS = {
    "tiny": tiny_model,
    "tiny, attention only": lambda: tiny_model(trained={"unet": "attentions", "controlnet": ""}),
    "tiny, decoder": lambda: tiny_model(trained={"unet": "", "vae": r"^decoder\."}),
    "pixels": PixelModel,
    "mini": built_once(load_model),
    **REDUCED,
}


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]()


def test_satisfies_the_contract(model):
    asked = {n: [p.requires_grad for p in m.parameters()] for n, m in model.networks.items()}
    lines = check_model(model)
    assert len(lines) == 5 and all(isinstance(line, str) for line in lines)
    assert {n: [p.requires_grad for p in m.parameters()] for n, m in model.networks.items()} == asked
    assert all(p.grad is None for m in model.networks.values() for p in m.parameters())


def test_everything_is_frozen_until_training_asks(model):
    assert not any(p.requires_grad for m in model.networks.values() for p in m.parameters())
    names = {n for n, p in model.unfreeze().trained_parameters().items() if p.requires_grad}
    asking = {f"{n}.{k}" for n, m in model.networks.items() for k, p in m.named_parameters() if p.requires_grad}
    assert names == asking != set()


def test_an_image_does_not_depend_on_its_batch(model):
    side = 4 * model.multiple // model.scale
    lr = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    both = sample(model, lr, ["cat", ""], generators(0, [0, 1]), 3)
    assert both.shape == (2, 3, model.scale * side, model.scale * side) and both.min() >= 0 and both.max() <= 1
    second = sample(model, lr[1:], [""], generators(0, [1]), 3)
    torch.testing.assert_close(both[1:], second, atol=1e-4, rtol=0)


def test_upscales_any_size_in_tiles(model):
    unit = model.multiple
    result = upscale(
        model, torch.rand(3, 7, 2 * unit + 3), tile=4 * unit, overlap=unit, num_inference_steps=2, progress=False
    )
    assert result.shape == (3, 7 * model.scale, (2 * unit + 3) * model.scale) and result.isfinite().all()


def test_frozen_weights_in_half_precision_are_what_autocast_makes_of_them(model):
    def made():
        with torch.autocast("cpu", torch.bfloat16):
            return sample(model, torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0)), ["cat"],
                          generators(0, [0]), 1)  # fmt: skip

    side = 2 * model.multiple // model.scale
    expected, exact, sizes = made(), model.networks, {}
    frozen = {name: network for name, network in exact.items() if name not in model.trained}
    model.networks = exact | {n: hold_weights(copy.deepcopy(m), torch.bfloat16) for n, m in frozen.items()}
    assert torch.equal(made(), expected)
    for name, network in frozen.items():
        sizes[name], held = (sum(p.nbytes for p in m.parameters()) for m in (network, model.networks[name]))
        assert 0.5 * sizes[name] <= held < sizes[name]
        assert held < 0.7 * sizes[name] or name == "text_encoder"  # whose embeddings are large here


def gradients(model):
    """Of a decoded estimate, by trained parameter and for the latents; and how many numbers were kept for them."""
    unit, kept = 2 * model.multiple, []
    weights = {p.untyped_storage()._cdata for m in model.networks.values() for p in m.parameters()}

    def keep(tensor):
        if tensor.untyped_storage()._cdata not in weights:
            kept.append(tensor.numel())
        return tensor

    generator = torch.Generator().manual_seed(0)
    condition = model.condition(torch.rand(1, 3, *[unit // model.scale] * 2, generator=generator), ["cat"])
    latents = torch.randn(1, model.latent_channels, *[unit // model.vae_scale_factor] * 2, generator=generator)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model.decode(model.predict(latents.requires_grad_(), torch.tensor(500), condition)).square().mean()
    tensors = {"latents": latents, **model.trained_parameters()}
    return dict(zip(tensors, torch.autograd.grad(loss, tensors.values(), allow_unused=True), strict=True)), sum(kept)


def test_checkpointing_keeps_less_and_gives_the_same_gradients(model):
    if isinstance(model, PixelModel):
        with pytest.raises(ValueError, match="gradient_checkpointing must be false for a PixelModel"):
            model.enable_gradient_checkpointing()
        return
    expected, kept = gradients(model.unfreeze())
    found, fewer = gradients(model.enable_gradient_checkpointing())
    assert 0 < fewer < 0.85 * kept  # at this width PASD-light keeps 0.82
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-6, atol=1e-10, msg=lambda text, name=name: name + text
        )


def test_fingerprint_follows_the_weights(model):
    before = model.fingerprint()
    assert before == model.fingerprint()
    network = model.networks[next(iter(model.trained))]
    with torch.no_grad():
        next(network.parameters()).view(-1)[0] += 1
    assert model.fingerprint() != before


# -- what the check notices -------------------------------------------------------------------------------------------


def careless(**methods):
    """A pixel model with methods of its own."""
    return type("Careless", (PixelModel,), methods)()


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ({"reference": copy.copy}, "reference must not share trained weights with the model, got network.weight"),
        ({"predict": torch.no_grad()(PixelModel.predict)}, "gradient is lost between Careless.predict and"),
        ({"decode": lambda self, z: z[..., ::2] / 2 + 0.5}, r"decode must give \[2, 3, 16, 16\], got \[2, 3, 16, 8\]"),
        ({"encode": lambda self, x: x[:, :2] * 2 - 1}, r"encode must give \[2, 3, 16, 16\], got \[2, 2, 16, 16\]"),
        ({"predict": lambda self, z, t, c: PixelModel.predict(self, z, t, c).flip(0)}, "must not mix the images"),
        (  # as public code has it: every image of a batch starts from the first one's latents
            {
                "initial_latents": lambda self, c, p, g: PixelModel.initial_latents(self, c[:1], p, g[:1]).repeat(
                    2, 1, 1, 1
                )
            },
            "initial_latents must start an image alike whatever its batch",
        ),
        (
            {"predict": lambda self, z, t, c: PixelModel.predict(self, z, t, c) * (1 if t.ndim else 2)},
            "one timestep per image",
        ),
        ({"decode": lambda self, z: (z / 2 + 0.5).detach()}, "gradient is lost"),
        (
            {"condition": lambda self, lr, p, n=None: PixelModel.condition(self, lr, p, n)[:1]},
            r"condition must give an image \[2, 3, 16, 16\], got \[1, 3, 16, 16\]",
        ),
    ],
)
def test_check_model_notices(methods, message):
    with pytest.raises(ValueError, match=message):
        check_model(careless(**methods))


def test_check_model_notices_a_network_without_gradient():
    model = PixelModel()
    model.networks["other"] = torch.nn.Linear(1, 1)
    model.trained["other"] = ""
    with pytest.raises(ValueError, match="no gradient reaches the trained network 'other'"):
        check_model(model)


def test_trained_must_match():
    with pytest.raises(ValueError, match=r"trained must name networks among vae, .*, got 'unte'"):
        tiny_model(trained={"unte": ""})
    with pytest.raises(ValueError, match=r"trained\['unet'\] must match a parameter of that network, got 'image_att'"):
        tiny_model(trained={"unet": "image_att"}).unfreeze()


def test_a_model_that_cannot_be_saved_says_so(tmp_path):
    with pytest.raises(TypeError, match="PixelModel cannot be saved; define save_pretrained"):
        PixelModel().save_pretrained(tmp_path / "model")
