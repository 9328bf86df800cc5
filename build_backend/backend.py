"""PEP 517 build backend: setuptools, plus the torch that is already in the environment.

A plain ``pip install -e .`` builds in isolation, where the user's torch cannot be imported. Naming torch as a
build requirement would download a second one, several gigabytes of it and perhaps of another CUDA. The
compiled libraries use the stable ABI and only need headers, so this backend puts the folder of the user's
torch at the end of ``sys.path`` and asks for torch only where there is none.
"""

from __future__ import annotations

import toolchain  # beside this file; pyproject.toml's backend-path puts the folder on sys.path
from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403 - the hooks that need no change


def _torch_requirement() -> list[str]:
    return [] if toolchain.expose_torch() else [f"torch>={'.'.join(map(str, toolchain.MIN_TORCH))}"]


def get_requires_for_build_wheel(config_settings=None):
    return build_meta.get_requires_for_build_wheel(config_settings) + _torch_requirement()


def get_requires_for_build_editable(config_settings=None):
    return build_meta.get_requires_for_build_editable(config_settings) + _torch_requirement()


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    toolchain.expose_torch()
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    toolchain.expose_torch()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
