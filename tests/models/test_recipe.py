"""What a model's folder, a configuration or the command line may say of how it is used."""

import dataclasses
import json

import pytest

from rfsr_ext.models import ControlNetISRModel, ISRModel, Recipe
from rfsr_ext.models.folders import ISR_CONFIG, read_config, read_json
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
