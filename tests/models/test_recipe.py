"""What a model's folder, a configuration or the command line may say of how it is used."""

import dataclasses
import json

import pytest
import torch

from rfsr_ext.mini import architecture
from rfsr_ext.models import ControlNetISRModel, ISRModel, Recipe
from rfsr_ext.models.folders import ISR_CONFIG, read_config, read_json
from rfsr_ext.sampling import trajectory
from tests.odd import ODD
from tests.tiny import PixelModel

# What of ODD is of use, by field; everything else must be refused.
ACCEPTED = {
    "guidance_scale": {"zero", "half"}, "added_prompt": {"empty", "text"}, "negative_prompt": {"empty", "text"},
    "temperature": {"zero", "half"}, "start_timestep": {"zero", "null"}, "color_fix": {"null"}, "overlap": {"zero"},
    "min_side": {"zero"},
    "t_max": {"zero"}, "t_min": {"zero"}, "structure_window": {"null"}, "reward_window": {"null"},
}  # fmt: skip


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Recipe)])
def test_odd_values_are_of_use_or_refused_in_one_sentence(name):
    accepted = set()
    for odd, value in ODD.items():
        try:
            recipe = Recipe().replace(**{name: value})
        except ValueError as error:
            assert str(error).startswith(f"{name} must be ") and ", got " in str(error) and "\n" not in str(error)
        else:
            accepted.add(odd)
            assert Recipe(**json.loads(json.dumps(recipe.to_dict(), allow_nan=False))) == recipe
    assert accepted == ACCEPTED.get(name, set())


class Knows(PixelModel):
    """Estimates the same image at every step, as a perfect network would."""

    def __init__(self, image, **recipe):
        super().__init__(num_inference_steps=5, start="lr")
        self.recipe, self.image, self.scheduler = self.recipe.replace(**recipe), image, architecture.scheduler()

    def predict(self, latents, timestep, condition):
        return self.image.expand_as(latents)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_training_noise_leads_to_the_states_that_sampling_passes_through(temperature):
    """DDIM with one estimate throughout, against z_t = α_t z_0 + σ_t (τ ε + (z_LR − z_0) α_T / σ_T)."""
    image = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    model = Knows(image, noising="to-start", temperature=temperature)
    condition, process = model.condition(torch.full((1, 3, 2, 2), 0.25), [""]), model.process()
    noise = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    shifted = model.training_noise(image, noise, condition, process)
    *states, _ = trajectory(model, condition, torch.Generator().manual_seed(5))
    assert len(states) == 5
    for (state, _), timestep in zip(states, process.timesteps, strict=True):
        alpha, sigma = (level.item() for level in process.level(timestep))
        first_alpha, first_sigma = (level.item() for level in process.level(process.timesteps[0]))
        by_hand = alpha * image + sigma * (temperature * noise + (-0.5 - image) * first_alpha / first_sigma)
        torch.testing.assert_close(process.add_noise(image, shifted, timestep), by_hand)
        torch.testing.assert_close(state.latents, by_hand, atol=1e-5, rtol=0)
    plain = Knows(image, temperature=temperature).training_noise(image, noise, condition, process)
    assert torch.equal(plain, noise)


@pytest.mark.parametrize("recipe", [{"start": "noise"}, {"start_timestep": 900}])
def test_noising_to_the_start_needs_an_lr_start_at_the_first_timestep(recipe):
    with pytest.raises(ValueError, match="noising must be plain where .*, got to-start; give start: lr and start_time"):
        Recipe(noising="to-start", **recipe)


def test_odd_attributes_of_a_model():
    def refused(name, value, sentence):
        model = PixelModel()
        setattr(model, name, value)
        with pytest.raises(ValueError, match=sentence) as error:
            ISRModel.__init__(model)
        assert "\n" not in str(error.value)

    for odd, value in ODD.items():
        refused("scale", value, "^scale must be a whole number from 1 to 64, got ")
        refused("trained", value, "^trained must name networks among" if odd == "mapping" else "^trained must be a map")
    for pattern in ("(", 5, None):
        refused("trained", {"network": pattern}, "^trained must give network a regular expression, got ")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (b"", "is not valid JSON"),
        (b"{", "is not valid JSON"),
        (b"\0", "is not valid JSON"),
        (b"[" * 10**5, "is not valid JSON"),
        (b"[1]", "must hold a JSON object, got a list"),
        (b'{"scal": 2}', "has an unknown key 'scal', which ControlNetISRModel does not take"),
        (b'{"recipe": [1]}', r"recipe in .* must be an object, got \[1\]"),
    ],
)
def test_damaged_facts_beside_a_model(tmp_path, text, sentence):
    (tmp_path / ISR_CONFIG).write_bytes(text)
    with pytest.raises(ValueError, match=sentence) as error:
        read_config(tmp_path, ControlNetISRModel)
    assert ISR_CONFIG in str(error.value) and "\n" not in str(error.value)


def test_facts_in_any_encoding(tmp_path):
    for encoding in ("utf-8-sig", "utf-16"):
        (tmp_path / "x.json").write_bytes('{"negative_prompt": "größer"}'.encode(encoding))
        assert read_json(tmp_path / "x.json") == {"negative_prompt": "größer"}
