"""The command ``rfsr``, which is also ``python -m rfsr_ext``; where torch is alone it says what to install."""

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line `rfsr_ext.cli.app`."""
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
