"""The command line as a user types it."""

import sys
import threading

import pytest

from rfsr_ext.__main__ import main


@pytest.fixture
def rfsr(monkeypatch, capsys):
    """Run ``rfsr`` with arguments; gives its exit code and what it printed."""
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)  # is set anew, and comes back after the test

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["rfsr", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        return stopped.value.code, capsys.readouterr()

    return run
