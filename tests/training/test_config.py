import dataclasses
import json
import math
import re
import sys
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from pydantic import Field

from rfsr_ext.data import Degradation
from rfsr_ext.importing import import_object
from rfsr_ext.models import load_model
from rfsr_ext.models.catalog import PUBLISHED
from rfsr_ext.rewards import WeightedReward
from rfsr_ext.training import RFSRConfig, RunConfig, load_config, setup
from rfsr_ext.training.config import RewardTerm
from rfsr_ext.training.runs import METHODS, method_presets
from tests.odd import ODD


def test_paper_preset_holds_the_papers_numbers():
    config = RFSRConfig.load("paper")
    assert (config.crop_size, config.batch_size, config.iterations) == (512, 8, 10_000)
    assert (config.structure_window, config.reward_window) == ((1, 20), (41, 50))
    assert (config.lambda_structure, config.lambda_style) == (5e-4, 5e-5)
    assert config.rewards == {"clipiqa": 5e-5, "image-reward": 5e-5}
    assert (config.learning_rate, config.ema_decay, config.style_loss) == (5e-6, 0.999, "gram")
    assert config.replace(output_dir=RFSRConfig().output_dir) == RFSRConfig()  # the defaults are the paper's too


def test_mini_preset_loads():
    assert RFSRConfig.load("mini", {"seed": 3}).seed == 3


@pytest.mark.parametrize("name", method_presets())
def test_presets_say_only_what_differs_from_the_defaults(name):
    chosen = load_config(name)
    defaults = type(chosen)()
    assert all(getattr(chosen, key) != getattr(defaults, key) for key in chosen.model_fields_set - {"method"})


def test_every_preset_is_of_one_method():
    files = [Path(file.name) for file in resources.files("rfsr_ext.presets").iterdir()]
    assert sorted(method_presets()) == sorted(file.stem for file in files if file.suffix == ".yaml")
    for method, (config, _) in METHODS.items():
        assert config().method == method
        assert {load_config(name).method for name in config.presets} <= {method}


def test_a_method_that_nobody_knows_is_named(tmp_path):
    (tmp_path / "run.yaml").write_text("method: rfrs\n")
    with pytest.raises(ValueError, match=r"run\.yaml: method must be one of rfsr.*, got 'rfrs'"):
        load_config(tmp_path / "run.yaml")
    with pytest.raises(ValueError, match=r"^preset mini: method must be one of rfsr.*, got None"):
        load_config("mini", {"method": None})
    with pytest.raises(ValueError, match=r"^config: method must be rfsr, got 'dp2o'"):
        RFSRConfig.from_dict({"method": "dp2o"})


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"lerning_rate": 1e-4}, "unknown key 'lerning_rate'; did you mean 'learning_rate'?"),
        ({5: 1e-4}, "unknown key '5'; valid are method, model, model_options, data, "),
        ({"style_loss": "grma"}, "style_loss must be gram, kl or none, got 'grma'; did you mean 'gram'?"),
        ({"style_loss": None}, "style_loss must be gram, kl or none, got None"),
        ({"iterations": "many"}, "iterations must be a whole number (at least 1, at most 10000000), got 'many'"),
        ({"iterations": 1.5}, "iterations must be a whole number (at least 1, at most 10000000), got 1.5"),
        ({"iterations": True}, "iterations must be a whole number (at least 1, at most 10000000), got True"),
        ({"batch_size": 0}, "batch_size must be a whole number (at least 1, at most 65536), got 0"),
        ({"crop_size": 63}, "crop_size must be a whole number (at least 8, at most 16384, a multiple of 4), got 63"),
        ({"ema_decay": 1.0}, "ema_decay must be a finite number (at least 0, below 1), got 1.0"),
        ({"learning_rate": math.nan}, "learning_rate must be a finite number (above 0, at most 1), got nan"),
        ({"max_grad_norm": 0}, "max_grad_norm must be a finite number (above 0, at most 1e+12) or null, got 0"),
        ({"seed": 2**32}, "seed must be a whole number (at least 0, below 4294967296), got 4294967296"),
        ({"seed": 10**5000}, "seed must be a whole number (at least 0, below 4294967296), got a number of thousands"),
        ({"adam_betas": [False, 0.9]}, "adam_betas must be [a, b], each a finite number (at least 0, below 1), got"),
        (
            {"structure_window": [1, 2, 3]},
            "structure_window must be [a, b], each a finite number or null, got [1, 2, 3",
        ),
        ({"structure_window": "1-20"}, "structure_window must be [a, b], each a finite number or null, got '1-20'"),
        ({"structure_window": [1, 1.5]}, "whole sampling steps from 1 to 1000 in order, got [1, 1.5]"),
        ({"structure_window": [9, 2]}, "structure_window must be [first, last], whole sampling steps from 1 to 1000"),
        (
            {"num_inference_steps": 20},
            "reward_window must be [first, last], whole sampling steps from 1 to 20 in order",
        ),
        (
            {"structure_window": [1, 45]},
            "structure_window must end before reward_window begins in sampling, got [1, 45]",
        ),
        (
            {"window_unit": "noise"},
            "must be [first, last], noise shares from 0 to 1 in order, got [1, 20] (window_unit:",
        ),
        (
            {"window_unit": "noise", "structure_window": [0.4, 1], "reward_window": [0, 0.5]},
            "structure_window must end before reward_window begins in sampling, got [0.4, 1] and [0, 0.5]",
        ),
        (
            {"window_unit": "timesteps", "structure_window": [600, 1001], "reward_window": None},
            "structure_window must be [first, last], timesteps from 0 to 1000 in order, got [600, 1001]",
        ),
        ({"reward_window": None, "structure_loss": "none"}, "because without both nothing is trained, got neither"),
        (
            {"batch_size": 6, "gradient_accumulation_steps": 4},
            "batch_size must be a multiple of gradient_accumulation_steps (4), got 6",
        ),
        ({"rewards": ["clipiqa"]}, "rewards must be a mapping of names to weights or options, got ['clipiqa']"),
        (
            {"rewards": {"clipiqa": "much"}},
            "rewards.clipiqa must be a finite number (at least 0, at most 1e+12), got 'mu",
        ),
        ({"rewards": {"clipiqa": {"cap": 2}}}, "rewards.clipiqa must have a weight, got {'cap': 2}"),
        ({"rewards": {"x": {"weigth": 1}}}, "unknown key 'rewards.x.weigth'; did you mean 'weight'?"),
        ({"rewards": {"x": {"weight": 1, "capp": 2}}}, "unknown key 'rewards.x.capp'; did you mean 'cap'?"),
        (
            {"rewards": {"x": {"weight": 1, "steps": 4}}},
            "rewards.x.steps must be [a, b], each a whole number (at least",
        ),
        ({"rewards": {"x": {"weight": 1, "steps": [4, 2]}}}, "rewards.x.steps must be [first, last] with 1 <= first"),
        ({"rewards": {"x": {"weight": 1, "views": [2]}}}, "rewards.x.views must be factors up to 1, such as 0.5, or"),
        ({"rewards": {"x": {"weight": 1, "views": [True]}}}, "rewards.x.views must be a list of text, got [True]"),
        ({"allow_overlap": "yes"}, "allow_overlap must be true or false, got 'yes'"),
        (
            {"data": 5},
            "data must be a folder, a list of folders, each a path or a mapping such as {path: FFHQ/, limit: ",
        ),
        ({"data": []}, "or {lr: LR/, gt: HR/}, photographs, or package.module:Name, got []"),
        ({"data": ["a", 5]}, "data[1] must be a path or a mapping with path, or with lr and gt, got 5"),
        ({"data": [{"path": "a", "limt": 5}]}, "unknown key 'data[0].limt'; did you mean 'limit'?"),
        ({"data": {"path": "a", "limit": 0.5}}, "data[0].limit must be a whole number (at least 1, at most 1000000000"),
        ({"data": {"path": "a", "weight": -1}}, "data[0].weight must be a finite number (above 0, at most 1e+12), got"),
        ({"data": ["a", {"lr": "b"}]}, "data[1]: it must have a path, or lr and gt, got {'lr': 'b'}"),
        ({"data": {"path": "a", "lr": "b", "gt": "c"}}, "data[0]: it must have a path, or lr and gt, got {'path': 'a'"),
        ({"data": {"stream": ""}}, "data.stream must be text that is not empty, got ''"),
        ({"data": {"stream": "x.tar", "lane": 4}}, "unknown key 'data.lane'; did you mean 'lanes'?"),
        ({"data": {"stream": "x.tar", "lanes": 0}}, "data.lanes must be a whole number (at least 1"),
        ({"data": [{"stream": "x.tar"}]}, "unknown key 'data[0].stream'"),
        ({"degradation": "realesrgan"}, "degradation must be mini, realesrgan-a, realesrgan-b, realesrgan-c, or a"),
        ({"degradation": {"scale": 2}}, "such as {preset: realesrgan-a, scale: 2}, got {'scale': 2}"),
        (
            {"degradation": {"preset": "realesrgan-a", "first": {"jpeg_range": [95, 30]}}},
            "degradation: preset realesrgan-a: first.jpeg_range must be",
        ),
        (
            {"validation_size": 28},
            "validation_size must be a whole number (at least 32, at most 16384, a multiple of 4), got 28",
        ),
        ({"model": 5}, "model must be text that is not empty, got 5"),
        ({"lora_targets": "to_q"}, "lora_targets must be a list of text that is not empty, got 'to_q'"),
        ({"points_per_rollout": 3}, "iterations must be a multiple of points_per_rollout (3), got 10000"),
        (
            {"points_per_rollout": 4, "checkpoint_every": 10},
            "checkpoint_every must be a multiple of points_per_rollout (4), got 10",
        ),
        ({"points_per_rollout": 2, "max_seconds": 5}, "max_seconds must be null with points_per_rollout above 1"),
        # names of version 0.1
        ({"regularization": "kl"}, "unknown key 'regularization'; write style_loss: gram, kl or none"),
        ({"lambda_regularization": 1}, "unknown key 'lambda_regularization'; write lambda_style"),
        ({"structure_timesteps": [600, 1000]}, "; write structure_window with window_unit: timesteps"),
        ({"reward_timesteps": [0, 200]}, "; write reward_window with window_unit: timesteps"),
        ({"structure_loss": "dwt-ll"}, "structure_loss must be haar-ll, l1 or none, got 'dwt-ll'; write haar-ll"),
        ({"style_loss": "gram-kl"}, "style_loss must be gram, kl or none, got 'gram-kl'; write gram"),
    ],
)
def test_one_sentence_for_bad_values(values, sentence):
    with pytest.raises(ValueError) as error:
        RFSRConfig.from_dict(values)
    assert str(error.value).startswith("config: ")
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


# What of ODD is of use, by key; everything else must be refused.
ACCEPTED = {
    "model": {"text"}, "data": {"text"}, "output_dir": {"text"}, "negative_prompt": {"empty", "text"},
    "max_grad_norm": {"half", "null"}, "guidance_scale": {"half", "null"}, "num_inference_steps": {"null"},
    "structure_window": {"null"}, "reward_window": {"null"}, "mixed_precision": {"false"},
    "structure_loss": {"false"}, "style_loss": {"false"}, "allow_overlap": {"true", "false"},
    "gradient_checkpointing": {"true", "false"}, "offload_reference": {"true", "false"}, "frozen_dtype": {"null"},
    "balance_rewards": {"true", "false"}, "ema_decay": {"zero"}, "lambda_structure": {"zero", "half"},
    "lambda_style": {"zero", "half"}, "seed": {"zero"}, "num_workers": {"zero"}, "lora_rank": {"zero"},
    "max_psnr_drop": {"zero", "minus", "half"}, "rewards": {"mapping"}, "model_options": {"mapping"},
    "weight_decay": {"zero"}, "max_seconds": {"half", "null"},
}  # fmt: skip


@pytest.mark.parametrize("key", RFSRConfig.model_fields)
def test_odd_values_are_of_use_or_refused_in_one_sentence(key):
    accepted = set()
    for name, value in ODD.items():
        try:
            config = RFSRConfig.from_dict({key: value})
        except ValueError as error:
            inside = next((part for part in (".a", "[0]") if f"{part} must" in str(error)), "")
            if (key, name) == ("data", "mapping"):
                assert str(error) == "config: unknown key 'data[0].a'; valid are path, lr, gt, weight, limit"
                continue
            assert str(error).startswith(f"config: {key}{inside} must be ")
            assert ", got " in str(error) and "\n" not in str(error) and len(str(error)) < 320
        else:
            accepted.add(name)
            assert RFSRConfig.from_dict(json.loads(json.dumps(config.to_dict(), allow_nan=False))) == config
    assert accepted == ACCEPTED.get(key, set())


@pytest.mark.parametrize("key", RewardTerm.model_fields)
def test_odd_values_of_a_reward_are_of_use_or_refused_in_one_sentence(key):
    wanted = {"weight": {"zero", "half"}, "cap": {"zero", "minus", "half", "null"}, "steps": {"null"}, "tags": {"null"},
              "views": {"list"}, "normalize": {"true", "false"}, "offload": {"true", "false"}}  # fmt: skip
    accepted = set()
    for name, value in ODD.items():
        try:
            RFSRConfig.from_dict({"rewards": {"x": {"weight": 1.0, key: value}}})
        except ValueError as error:
            assert str(error).startswith(f"config: rewards.x.{key} must be ")
            assert ", got " in str(error) and "\n" not in str(error)
        else:
            accepted.add(name)
    assert accepted == wanted[key]


def test_the_options_of_a_reward_are_the_fields_of_weighted_reward():
    fields = {f.name: f.default for f in dataclasses.fields(WeightedReward) if f.init and f.name != "reward"}
    assert list(RewardTerm.model_fields) == list(fields)
    assert RewardTerm(weight=1).model_dump() == fields | {"weight": 1.0}


def test_the_constructor_speaks_in_one_sentence_too():
    with pytest.raises(
        ValueError, match=r"^learning_rate must be a finite number \(above 0, at most 1\), got 5000000.0$"
    ):
        RFSRConfig(learning_rate=5e6)
    with pytest.raises(ValueError, match="^unknown key 'sede'; did you mean 'seed'"):
        RFSRConfig().replace(sede=1)


def test_yaml_as_it_was_meant(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(  # YAML 1.1 reads 5e-6 and 1e4 as text, no and off as false
        "learning_rate: 5e-6\niterations: 1e4\nadam_betas: [5e-1, 0.9]\nreward_window: null\n"
        "mixed_precision: no\nstyle_loss: off\nbalance_rewards: off\n"
    )
    config = RFSRConfig.load(file)
    assert (config.learning_rate, config.iterations, config.adam_betas) == (5e-6, 10_000, (0.5, 0.9))
    assert (config.reward_window, config.balance_rewards) == (None, False)
    assert (config.mixed_precision, config.style_loss) == ("no", "none")
    assert RFSRConfig.from_dict({"structure_loss": False}).structure_loss == "none"


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "cp1252"])
def test_files_as_windows_writes_them(tmp_path, encoding):
    (tmp_path / "run.yaml").write_bytes("negative_prompt: größer\r\nseed: 3\r\n".encode(encoding))
    config = RFSRConfig.load(tmp_path / "run.yaml")
    assert (config.negative_prompt, config.seed) == ("größer", 3)


def test_paths_are_taken_as_text():
    config = RFSRConfig(
        output_dir=Path("runs/x"), data=[Path("a"), {"path": Path("b")}], model_options={"w": Path("c")}
    )
    assert config.to_dict() == RFSRConfig(
        output_dir="runs/x", data=["a", {"path": "b"}], model_options={"w": "c"}
    ).to_dict()  # fmt: skip
    assert json.loads(json.dumps(config.to_dict()))["data"] == ["a", {"path": "b"}]
    assert RFSRConfig.load("mini", {"output_dir": Path("runs/x")}).output_dir == "runs/x"


def test_dates_are_text_and_the_home_folder_is_written_out(tmp_path, monkeypatch):
    """As no shell does it in a file, nor behind an equals sign."""
    monkeypatch.setenv("HOME", "/home/me")
    file = tmp_path / "run.yaml"
    file.write_text("model: 2026-11-30\noutput_dir: ~/runs\ndata: [~/a b, {path: ~/b}, '~/c', a~/d]\nmax_seconds: ~\n")
    config = RFSRConfig.load(file)
    assert (config.model, config.output_dir, config.max_seconds) == ("2026-11-30", "/home/me/runs", None)
    assert config.data == ["/home/me/a b", {"path": "/home/me/b"}, "~/c", "a~/d"]
    file.write_text("model: 2024-13-45\n")  # no day of any month
    assert RFSRConfig.load(file).model == "2024-13-45"


def test_a_key_that_stands_twice_is_refused(tmp_path):
    file = tmp_path / "run.yaml"
    for text, key, lines in (
        ("seed: 1\niterations: 2\n'seed': 3\n", "seed", "1 and 3"),
        ("data:\n  path: a\n  path: b\n", "path", "2 and 3"),
    ):
        file.write_text(text)
        sentence = f"run.yaml is not valid YAML: key '{key}' stands twice, in lines {lines}; keep one"
        with pytest.raises(ValueError, match=sentence):
            RFSRConfig.load(file)
    file.write_text("rewards: {mini-iqa: &one {weight: 1, cap: 2}, mini-preference: {<<: *one, cap: 3}}\n")
    assert RFSRConfig.load(file).rewards["mini-preference"] == {"weight": 1.0, "cap": 3.0}


def test_windows_in_each_unit():
    steps = RFSRConfig(num_inference_steps=20, structure_window=[1, 8.0], reward_window=(18, 20))
    assert json.dumps(steps.to_dict()["structure_window"]) == "[1, 8]"  # steps stay whole numbers
    timesteps = RFSRConfig(window_unit="timesteps", structure_window=[600, 1000], reward_window=[0, 200])
    noise = RFSRConfig(window_unit="noise", structure_window=[0.5, 1], reward_window=[0, 0.5])
    assert (timesteps.reward_window, noise.reward_window) == ((0, 200), (0, 0.5))
    overlapping = RFSRConfig(structure_window=[1, 50], reward_window=[1, 50], allow_overlap=True)
    assert overlapping.structure_window == overlapping.reward_window


def test_rewards_are_numbers_or_mappings(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "rewards:\n  clipiqa: 1e-2\n"
        "  image-reward: {weight: 1e-3, cap: 2, steps: [45, 50], views: [1, 0.5, crop-256], normalize: true}\n"
    )
    config = RFSRConfig.load(file)
    assert config.rewards == {
        "clipiqa": 1e-2,
        "image-reward": {
            "weight": 1e-3, "cap": 2.0, "steps": [45, 50], "views": ["1", "0.5", "crop-256"], "normalize": True,
        },
    }  # fmt: skip
    assert RFSRConfig.from_dict(config.to_dict()) == config
    plain, term = setup.build_rewards({"mini-iqa": 0.5, "mini-preference": config.rewards["image-reward"]})
    assert (plain.weight, plain.cap, plain.views) == (0.5, None, ("1",))
    assert (term.weight, term.cap, term.normalize, term.reward.name) == (1e-3, 2.0, True, "mini-preference")


def test_broken_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a file nor one of the presets mini, paper"):
        RFSRConfig.load(tmp_path / "absent.yaml")
    broken = tmp_path / "broken.yaml"
    for text in (b"a: [1, 2", b"\xff\xfe\xfa", b"seed: \0", b"seed: " + b"9" * 5000):
        broken.write_bytes(text)
        with pytest.raises(ValueError, match="^[^\n]*is not valid YAML: [^\n]*$"):
            RFSRConfig.load(broken)
    broken.write_text("- 1\n- 2")
    with pytest.raises(ValueError, match="must hold 'key: value' lines, got a list"):
        RFSRConfig.load(broken)


def test_a_configuration_cannot_be_changed_in_place():
    config = RFSRConfig()
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 1
    assert config == RFSRConfig() != config.replace(seed=1)


def test_round_trip_and_what_may_change_on_resume():
    config = RFSRConfig.load("mini")
    assert RFSRConfig.from_dict(config.to_dict()) == config
    free = dict(iterations=999, output_dir="elsewhere", learning_rate=1e-6, max_skipped=99, validate_every=7,
                checkpoint_every=7, keep_checkpoints=7, num_workers=1)  # fmt: skip
    saved = json.loads(json.dumps(config.to_dict()))
    assert config.replace(**free).differs(saved) == []
    assert config.replace(lambda_style=1.0, seed=9, **free).differs(saved) == ["lambda_style", "seed"]


class ToyConfig(RunConfig):
    """What another method would add, with plain annotations."""

    beta: float = Field(0.5, gt=0, le=10, description="strength")
    pairs: int = Field(2, ge=1, description="pairs per image")


def test_another_method_has_keys_of_its_own():
    config = ToyConfig.from_dict({"beta": "1e-1", "pairs": "1e1", "seed": 4})
    assert (config.beta, config.pairs, config.seed, config.iterations) == (0.1, 10, 4, 10_000)
    assert config.differs(config.replace(beta=0.2).to_dict()) == ["beta"]
    assert ToyConfig.from_dict(config.to_dict()) == config != RunConfig(seed=4)
    for values, sentence in [
        ({"beta": True}, "beta must be a finite number (above 0, at most 10), got True"),
        ({"beta": math.nan}, "beta must be a finite number (above 0, at most 10), got nan"),
        ({"pairs": 1.5}, "pairs must be a whole number (at least 1), got 1.5"),
        ({"sede": 1}, "unknown key 'sede'; did you mean 'seed'?"),
        ({"rewards": {}}, "unknown key 'rewards'; "),
        ({"batch_size": 3, "gradient_accumulation_steps": 2}, "batch_size must be a multiple of"),
    ]:
        with pytest.raises(ValueError) as error:
            ToyConfig.from_dict(values)
        assert str(error.value).startswith(f"config: {sentence}")


def test_every_key_has_a_description_of_one_line():
    for field in RFSRConfig.model_fields.values():
        assert field.description and "\n" not in field.description


OWN = """
from rfsr_ext.models import load_model
from rfsr_ext.models.catalog import PUBLISHED
from rfsr_ext.rewards import Reward
from tests.training.conftest import Brightness, TinyData

NUMBER = 5

class Sharpness(Reward):
    name = "sharpness"
    def score(self, images, prompts=None):
        return images.diff(dim=-1).abs().mean((1, 2, 3))

class Sharp:
    reward = Sharpness

def data(config):
    made = TinyData()
    made.seed = config.seed
    return made

def model():
    return load_model("mini")
"""


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    (tmp_path / "my_own_objects.py").write_text(OWN)
    (tmp_path / "my_broken_objects.py").write_text("import a_package_nobody_has\n")
    (tmp_path / "my_wrong_objects.py").write_text("def (:\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "my_own_objects"
    for name in ("my_own_objects", "my_broken_objects", "my_wrong_objects"):
        sys.modules.pop(name, None)


def test_objects_of_the_users_own(own_module):
    config = RFSRConfig(data=f"{own_module}:data", seed=7, rewards={f"{own_module}:Sharp.reward": {"weight": 2}})
    assert setup.build_dataset(config).seed == 7
    (term,) = setup.build_rewards(config.rewards)
    assert (term.reward.name, term.weight) == ("sharpness", 2.0)
    assert load_model(f"{own_module}:model").scale == 4


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("my_own_objects", "reward must have the form package.module:Name, got 'my_own_objects'"),
        ("my_own_objects:Sharpnes", "must name something in 'my_own_objects', which has no 'Sharpnes'"),
        ("my_own_objects:NUMBER", "must name something to call, got a int"),
        ("my_absent_objects:Name", "must name a module that can be imported, got ModuleNotFoundError: No module named"),
        ("my_broken_objects:Name", "got ModuleNotFoundError: No module named 'a_package_nobody_has'"),
        ("my_wrong_objects:Name", "must name a module that can be imported, got SyntaxError: "),
    ],
)
def test_one_sentence_for_objects_that_cannot_be_had(own_module, name, sentence):
    with pytest.raises(ValueError) as error:
        import_object(name, "reward")
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_folders_of_a_configuration(tmp_path):
    text = """
    data:
      - DIV2K
      - {path: FFHQ, weight: 0.5, limit: 2}
      - {lr: RealSR/LR, gt: RealSR/HR}
    crop_size: 32
    """
    for folder, side in {"DIV2K": 40, "FFHQ": 40, "RealSR/LR": 10, "RealSR/HR": 40}.items():
        (tmp_path / folder).mkdir(parents=True)
        for i in range(3):
            pixels = np.random.default_rng(i).integers(0, 256, (side, side, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / folder / f"{i}.png")
    (tmp_path / "run.yaml").write_text(re.sub(r"(DIV2K|FFHQ|RealSR/.R)", rf"{tmp_path}/\1", text))
    config = RFSRConfig.load(tmp_path / "run.yaml")
    assert config.data == [
        f"{tmp_path}/DIV2K",
        {"path": f"{tmp_path}/FFHQ", "weight": 0.5, "limit": 2},
        {"lr": f"{tmp_path}/RealSR/LR", "gt": f"{tmp_path}/RealSR/HR"},
    ]
    dataset = setup.build_dataset(config)
    assert dataset.degradation == Degradation.preset("realesrgan-a")
    assert [root.weight for root in dataset.roots] == [1, 0.5, 1] and len(dataset) == 3 + 2 + 3
    assert not config.differs(json.loads(json.dumps(config.to_dict())))


def test_shards_of_a_configuration(monkeypatch):
    asked = []
    monkeypatch.setattr(setup, "StreamedImages", lambda *arguments: asked.append(arguments))
    config = RFSRConfig(data={"stream": "hf://datasets/x/*.tar", "lanes": 32}, crop_size=64, seed=3)
    setup.build_dataset(config)
    assert asked == [("hf://datasets/x/*.tar", 64, 3, Degradation.preset("realesrgan-a"), 32)]
    assert not config.differs(json.loads(json.dumps(config.to_dict()))) and setup.data_roots(config) == []


def test_degradation_of_a_configuration():
    changes = {"preset": "mini", "scale": 2, "first": {"noise_range": [0, 1]}}
    config = RFSRConfig(degradation=changes, crop_size=64)
    crops = setup.build_dataset(config)
    assert crops.degradation == Degradation.preset("mini", scale=2, first={"noise_range": (0, 1)})
    assert crops[0]["lr"].shape == (3, 32, 32) and not config.differs(json.loads(json.dumps(config.to_dict())))
    assert setup.build_dataset(RFSRConfig.load("mini")).degradation == Degradation.preset("mini")


def test_objects_of_another_kind_are_refused(own_module):
    with pytest.raises(
        ValueError,
        match="reward 'my_own_objects:model' must return an instance of Reward, got one of ControlNetISRModel$",
    ):
        setup.build_rewards({f"{own_module}:model": 1.0})
    with pytest.raises(
        ValueError, match="^model 'my_own_objects:Sharpness' must return an instance of ISRModel, got one of Sharpness$"
    ):
        load_model(f"{own_module}:Sharpness")


def test_what_is_shown_is_the_configuration(capsys, tmp_path):
    from rfsr_ext.cli.config import parse_pairs, show_config

    changes = ["rewards={mini-iqa: 1e-3, x: {weight: 2, steps: [3, 4]}}", "seed=5"]
    show_config("mini", parse_pairs("--set", changes) | {"negative_prompt": "blurry, größer: 2"})
    printed = capsys.readouterr().out
    (tmp_path / "shown.yaml").write_text(printed)
    shown = RFSRConfig.load(tmp_path / "shown.yaml")
    assert shown.rewards == {"mini-iqa": 1e-3, "x": {"weight": 2.0, "steps": [3, 4]}}
    assert shown == RFSRConfig.load(
        "mini", {"seed": 5, "negative_prompt": "blurry, größer: 2", "rewards": shown.rewards}
    )
    assert list(yaml.safe_load(printed)) == list(RFSRConfig.model_fields)
    assert "# β1 and β2 of Adam\nadam_betas: [0.9, 0.999]\n" in printed


def test_a_model_with_its_options_in_one_mapping():
    config = RFSRConfig.from_dict({"model": {"name": "seesr", "weights": "files/"}, "model_options": {"scale": 2}})
    assert config.model == "seesr" and config.model_options == {"weights": "files/", "scale": 2}
    with pytest.raises(ValueError, match=r"model must be a name or such as {name: seesr, weights: DIR}, got"):
        RFSRConfig.from_dict({"model": {"weights": "files/"}})


def test_presets_of_the_paper():
    table = Path(str(resources.files("rfsr_ext.presets") / "paper_table1.csv")).read_text().splitlines()
    columns = table[1].split(",")
    for preset, model, windows in (
        ("paper-seesr", "SeeSR", ((1, 20), (41, 50))),
        ("paper-pasd", "PASD", ((1, 8), (18, 20))),
        ("paper-diffbir", "DiffBIR", ((1, 20), (41, 50))),
        ("paper-diffbir-tag", "DiffBIR-tag", ((1, 20), (41, 50))),
    ):
        config = RFSRConfig.load(preset)
        assert (config.structure_window, config.reward_window) == windows and config.degradation == "realesrgan-a"
        assert config.model in PUBLISHED and {model, f"{model}-RFSR"} <= set(columns)
        assert (config.lambda_structure, config.lambda_style) == (5e-4, 5e-5)
    assert len(table) == 2 + 3 * 5 and {len(row.split(",")) for row in table[1:]} == {11}
