"""Seconds that survive a kill."""

import time

import pytest

from rfsr_ext.training.kept import count_seconds, read_seconds


def test_seconds_add_up_over_interruptions_and_are_written_meanwhile(tmp_path):
    path = tmp_path / "run" / "seconds"
    assert read_seconds(path) == 0
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt), count_seconds(path):
        time.sleep(0.03)
        raise KeyboardInterrupt
    first = read_seconds(path)
    assert 0.03 <= first <= time.monotonic() - began
    with count_seconds(path, every=0.01):
        while read_seconds(path) <= first:  # a kill would leave this
            assert time.monotonic() - began < 60
            time.sleep(0.005)
        during = read_seconds(path)
    assert during <= read_seconds(path) <= time.monotonic() - began
