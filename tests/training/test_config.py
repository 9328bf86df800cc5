import pytest

from rfsr_ext.training import RFSRConfig, setup


def test_paper_preset_holds_the_papers_numbers():
    config = RFSRConfig.load("paper")
    assert (config.crop_size, config.batch_size, config.iterations) == (512, 8, 10_000)
    assert (config.structure_window, config.reward_window) == ((1, 20), (41, 50))
    assert (config.lambda_structure, config.lambda_regularization) == (5e-4, 5e-5)
    assert config.rewards == {"clipiqa": 5e-5, "image-reward": 5e-5}
    assert (config.learning_rate, config.ema_decay, config.regularization) == (5e-6, 0.999, "gram-kl")
    assert config == RFSRConfig()  # the defaults are the paper's too


def test_mini_preset_loads():
    assert RFSRConfig.load("mini", {"seed": 3}).seed == 3


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"lerning_rate": 1e-4}, "unknown key 'lerning_rate'; did you mean 'learning_rate'?"),
        ({"regularization": "gramkl"}, "must be one of gram-kl, kl, none, got 'gramkl'; did you mean 'gram-kl'?"),
        ({"iterations": "many"}, "iterations must be of type int, got 'many'"),
        ({"iterations": 1.5}, "iterations must be of type int, got 1.5"),
        ({"iterations": True}, "iterations must be of type int, got True"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"ema_decay": 1.0}, "ema_decay must be in [0, 1), got 1.0"),
        ({"structure_window": [1, 2, 3]}, "structure_window must be of type tuple[int, int] | None, got [1, 2, 3]"),
        ({"structure_window": "1-20"}, "structure_window must be of type"),
        ({"rewards": ["clipiqa"]}, "rewards must be of type dict[str, float | dict"),
        ({"rewards": {"clipiqa": "much"}}, "rewards.clipiqa must be of type float, got 'much'"),
        ({"rewards": {"clipiqa": {"cap": 2}}}, "rewards.clipiqa must have a weight, got {'cap': 2}"),
        ({"rewards": {"x": {"weight": 1, "capp": 2}}}, "unknown key 'rewards.x.capp'; did you mean 'cap'?"),
        (
            {"rewards": {"x": {"weight": 1, "steps": 4}}},
            "rewards.x.steps must be of type tuple[int, int] | None, got 4",
        ),
        ({"rewards": {"x": {"weight": 1, "views": [2]}}}, "rewards.x.views must be factors up to 1, such as 0.5, or"),
        ({"allow_overlap": "yes"}, "allow_overlap must be of type bool"),
        ({"model": 5}, "model must be of type str, got 5"),
    ],
)
def test_one_sentence_for_bad_values(values, sentence):
    with pytest.raises(ValueError) as error:
        RFSRConfig.from_dict(values)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_exponents_without_a_dot_are_numbers(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("learning_rate: 5e-6\nreward_window: null\n")  # YAML 1.1 reads 5e-6 as a string
    config = RFSRConfig.load(file)
    assert config.learning_rate == 5e-6
    assert config.reward_window is None


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
    assert (term.weight, term.cap, term.normalize, term.reward.name) == (1e-3, 2.0, True, "MiniPreference")


def test_broken_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a file nor one of the presets mini, paper"):
        RFSRConfig.load(tmp_path / "absent.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1, 2")
    with pytest.raises(ValueError, match="is not valid YAML"):
        RFSRConfig.load(broken)
    broken.write_text("- 1\n- 2")
    with pytest.raises(ValueError, match="must hold 'key: value' lines, got a list"):
        RFSRConfig.load(broken)


def test_round_trip_and_what_may_change_on_resume():
    config = RFSRConfig.load("mini")
    assert RFSRConfig.from_dict(config.to_dict()) == config
    assert config.differs(config.replace(iterations=999, output_dir="elsewhere").to_dict()) == []
    assert config.differs(config.replace(learning_rate=1.0, seed=9).to_dict()) == ["learning_rate", "seed"]
