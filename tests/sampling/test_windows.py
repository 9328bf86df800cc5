import pytest
from diffusers import DDPMScheduler, UniPCMultistepScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from rfsr_ext.sampling import TimestepWindows
from tests.tiny import sd_scheduler


def test_paper_windows():
    seesr = TimestepWindows.from_steps(20, 40, 50)
    assert (seesr.structure, seesr.reward, seesr.last) == ((1, 20), (41, 50), 50)
    pasd = TimestepWindows.from_steps(8, 17, 20)
    assert (pasd.structure, pasd.reward, pasd.last) == ((1, 8), (18, 20), 20)


def test_timesteps_give_the_same_windows_for_50_ddim_steps():
    scheduler = sd_scheduler()
    scheduler.set_timesteps(50)
    assert TimestepWindows.from_timesteps(scheduler.timesteps) == TimestepWindows.from_steps(20, 40, 50)


@pytest.mark.parametrize("kind", [DDPMScheduler, UniPCMultistepScheduler])
@pytest.mark.parametrize("steps", [10, 20, 50])
def test_timesteps_of_other_samplers(kind, steps):
    scheduler = kind.from_config(sd_scheduler().config)
    scheduler.set_timesteps(steps)
    windows = TimestepWindows.from_timesteps(scheduler.timesteps)
    assert windows.last == len(scheduler.timesteps)
    for step, t in enumerate(scheduler.timesteps.tolist(), start=1):
        assert windows.in_structure(step) == (600 <= t <= 1000)
        assert windows.in_reward(step) == (0 <= t <= 200)


@settings(deadline=None)
@given(st.data())
def test_steps_are_those_of_either_window(data):
    last = data.draw(st.integers(1, 60))
    structure_last = data.draw(st.integers(0, last))
    reward_after = data.draw(st.integers(structure_last, last).filter(lambda n: structure_last or n < last))
    windows = TimestepWindows.from_steps(structure_last, reward_after, last)
    assert windows.steps() == [*range(1, structure_last + 1), *range(reward_after + 1, last + 1)]
    for step in range(-1, last + 3):
        assert windows.in_structure(step) == (1 <= step <= structure_last)
        assert windows.in_reward(step) == (reward_after < step <= last)


@settings(deadline=None)
@given(st.data())
def test_timestep_windows_hold_exactly_the_timesteps_asked_for(data):
    timesteps = sorted(data.draw(st.sets(st.integers(0, 999), min_size=2, max_size=60)), reverse=True)
    low, high = sorted(data.draw(st.tuples(st.sampled_from(timesteps), st.sampled_from(timesteps))))
    windows = TimestepWindows.from_timesteps(timesteps, structure=(low, high), reward=None)
    assert [timesteps[step - 1] for step in windows.steps()] == [t for t in timesteps if low <= t <= high]


def test_empty_windows():
    assert TimestepWindows.from_steps(0, 40, 50).structure is None
    assert TimestepWindows.from_steps(20, 50, 50).reward is None
    assert TimestepWindows(None, (3, 4), 5).steps() == [3, 4]
    with pytest.raises(ValueError, match="windows must hold at least one sampling step, got two empty windows"):
        TimestepWindows.from_steps(0, 50, 50)


@pytest.mark.parametrize("window", [(0, 5), (5, 4), (40, 51), (-3, -1)])
@pytest.mark.parametrize("name", ["structure", "reward"])
def test_windows_beyond_the_steps(name, window):
    other = {"structure": "reward", "reward": "structure"}[name]
    with pytest.raises(ValueError, match=rf"{name} window must lie within .* 1 to 50.* got \[{window[0]},"):
        TimestepWindows(**{name: window, other: None, "last": 50})


def test_overlapping_windows():
    with pytest.raises(ValueError, match=r"structure window must end .* got \[1, 20\] and \[20, 50\]; set"):
        TimestepWindows((1, 20), (20, 50), 50)
    both = TimestepWindows((1, 50), (1, 50), 50, allow_overlap=True)
    assert both.steps() == list(range(1, 51)) and both.in_structure(50) and both.in_reward(1)


def test_window_without_any_timestep():
    with pytest.raises(ValueError, match=r"reward window in timesteps .* one of .* 3, 900 … 300, got \[0, 200\]"):
        TimestepWindows.from_timesteps([900, 600, 300])
