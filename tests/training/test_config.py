import pytest

from rfsr_ext.training import RFSRConfig


def test_paper_preset_holds_the_papers_numbers():
    config = RFSRConfig.load("paper")
    assert (config.crop_size, config.batch_size, config.iterations) == (512, 8, 10_000)
    assert (config.structure_window, config.reward_window) == ((1, 20), (41, 50))
    assert (config.lambda_structure, config.lambda_regularization) == (5e-4, 5e-5)
    assert config.rewards == {"clipiqa": 5e-5, "imagereward": 5e-5}
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
        ({"rewards": ["clipiqa"]}, "rewards must be of type dict[str, float]"),
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
