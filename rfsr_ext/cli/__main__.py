"""``python -m rfsr_ext.cli``: the way to start the command line under ``accelerate launch -m``."""

from rfsr_ext.cli import app

app()
