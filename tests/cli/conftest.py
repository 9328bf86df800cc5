"""The command line as a user types it."""

import sys

import pytest

from rfsr_ext.cli import app


@pytest.fixture
def rfsr(monkeypatch, capsys):
    """Run ``rfsr`` with arguments; gives its exit code and what it printed."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["rfsr", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            app()
        return stopped.value.code, capsys.readouterr()

    return run
