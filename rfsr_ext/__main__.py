"""The command ``rfsr``, which is also ``python -m rfsr_ext``; where torch is alone it says what to install."""

import sys

__all__ = ["main"]

_GOES_ON = "interrupted; the same command goes on from the last checkpoint, if there is one yet"
_INTERRUPTED = dict.fromkeys(("demo", "train", "ablate", "compare", "mini", "preferences"), _GOES_ON)


def main() -> None:
    """Run the command line `rfsr_ext.cli.app`; an interruption at any moment is one sentence and exit code 130."""
    try:
        _run()
    except (KeyboardInterrupt, SystemExit) as stopped:
        if isinstance(stopped, SystemExit) and stopped.code != 130:  # what typer makes of KeyboardInterrupt
            raise
        command = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
        print(f"rfsr: {_INTERRUPTED.get(command, 'interrupted; nothing is half written')}", file=sys.stderr)
        sys.exit(130)


def _run() -> None:
    try:
        from rfsr_ext.cli import app
    except ModuleNotFoundError as error:
        sys.exit(
            f"rfsr: the package {error.name} is missing; the losses need torch alone, the command line needs more: "
            "pip install 'rfsr_ext[train]'"
        )
    app()


if __name__ == "__main__":
    main()
