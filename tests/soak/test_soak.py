"""What is soaked for hours runs a little here, and sees an error that is planted."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.soak import __main__ as soak
from tests.soak import inputs, kills, operators


def test_a_few_calls():
    for i in range(6):
        operators.trial(i)


@pytest.mark.slow
def test_a_few_files():
    for i in range(6):
        inputs.trial(i)


@pytest.mark.parametrize(
    ("name", "i", "part"),
    [
        ("haar_ll", 1, "value"), ("haar_ll", 1, "gradient"), ("haar_ll_l1_loss", 1, "value"),
        ("haar_ll_l1_loss", 1, "gradient"), ("gram_matrix", 0, "value"), ("gram_loss", 0, "value"),
        ("gram_loss", 0, "gradient"),
    ],
)  # fmt: skip
def test_an_error_of_an_operator_is_seen(monkeypatch, name, i, part):
    true = getattr(operators, name)

    def wrong(*args, **options):
        result = true(*args, **options)
        return 1.01 * result - (0 if part == "value" else 0.01 * result.detach())

    monkeypatch.setattr(operators, name, wrong)
    with pytest.raises(AssertionError, match="is off by"):
        for k in range(20):
            operators.trial(i + 2 * k)


def test_a_file_that_is_read_wrong_is_seen(monkeypatch):
    monkeypatch.setattr(inputs, "checkpoint", lambda: ({}, {}, bytes(100)))
    monkeypatch.setattr(inputs, "load_tensors", lambda path: ({"x": torch.zeros(1)}, {}))
    with pytest.raises(AssertionError, match="other numbers"):
        inputs.checkpoint_file(inputs.np.random.default_rng(0))
    monkeypatch.setattr(inputs, "load_tensors", lambda path: {}["no sentence"])
    with pytest.raises(AssertionError, match="KeyError"):
        inputs.checkpoint_file(inputs.np.random.default_rng(0))


def test_it_goes_on_where_it_stopped_and_reports(monkeypatch, tmp_path):
    seen = []

    def run(first, last):
        seen.append((first, last))
        assert first != 2, "planted"

    monkeypatch.setattr(soak, "STATE", tmp_path / "state.json")
    monkeypatch.setattr(soak, "HERE", tmp_path)
    monkeypatch.setattr(soak, "PARTS", {"operators": soak.Part(run, 100, 1, "calls")})
    for count in (2, 5):
        monkeypatch.setattr(sys, "argv", ["soak", "--operators", str(count)])
        if count == 2:
            soak.main()
        else:
            with pytest.raises(SystemExit, match="1 failures"):
                soak.main()
    assert seen == [(n, n + 1) for n in range(5)]
    assert json.loads((tmp_path / "state.json").read_text())["operators"]["done"] == 5
    report = (tmp_path / "results.md").read_text()
    assert "| operators | calls | 5 | 100 | 1 |" in report and "* operators 2: AssertionError: planted" in report


@pytest.mark.slow
def test_one_kill_of_each_kind():
    """In a process of its own: one that has computed gradients cannot fork processes that do."""
    command = [sys.executable, "-m", "tests.soak.kills", "0", str(len(kills.KINDS))]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
