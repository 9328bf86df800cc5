"""Commands of ``rfsr``, one after the other, as if the device elsewhere were this machine's GPU.

``python -m tests.elsewhere.commands LIBRARY COMMANDS``: the device, compiled, and a JSON list of lists of arguments.
Each command ends in a line of JSON: its exit code or what it said, and how much was computed on the device.
"""

import json
import sys

from rfsr_ext import cli
from tests.elsewhere import NAME, computed, register


def take_by_default() -> None:
    """Have the command line find it where it looks for a GPU."""
    for module in [module for name, module in sys.modules.items() if name.startswith("rfsr_ext.cli")]:
        if hasattr(module, "choose_device"):
            module.choose_device = lambda given=None: given or NAME


def main() -> None:
    library, commands = sys.argv[1], json.loads(sys.argv[2])
    register(library)
    take_by_default()
    for command in commands:
        sys.argv, before = ["rfsr", *command], computed()
        try:
            cli.app()
        except SystemExit as stopped:
            print(json.dumps({"ended": stopped.code, "computed": computed() - before}), flush=True)


if __name__ == "__main__":
    main()
