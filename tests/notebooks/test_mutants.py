"""The planted errors (mutants.txt) can be planted, and what is written about them is what was found."""

import importlib.util
import json
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("mutants", Path(__file__).with_name("mutants.py"))
mutants = importlib.util.module_from_spec(spec)
spec.loader.exec_module(mutants)
ALL = mutants.read()


@pytest.mark.parametrize("mutant", ALL, ids=lambda mutant: mutant.name)
def test_it_can_be_planted_and_is_python(mutant):
    assert mutant.old != mutant.new
    compile(mutant.text(), mutant.file, "exec")


def test_there_are_enough_and_nearly_all_are_noticed():
    assert len({mutant.name for mutant in ALL}) == len(ALL) >= 30
    results, _ = json.loads(mutants.RESULTS.read_text())
    assert not set(results) - {mutant.name for mutant in ALL}, "run `make mutants`"
    assert sum(bool(found["noticed_by"]) for found in results.values()) >= 0.9 * len(results) >= 27
    for mutant in ALL:
        if mutant.name in results and not results[mutant.name]["noticed_by"]:
            assert mutant.reason, f"say in mutants.txt why {mutant.name!r} may live"


def test_the_score_is_the_one_found():
    text, score = mutants.page(ALL, json.loads(mutants.RESULTS.read_text())[0])
    assert text.partition("## ")[2] == mutants.PAGE.read_text().partition("## ")[2], "run `make mutants`"
    assert mutants.SCORE.findall(mutants.README.read_text()) == [score]
