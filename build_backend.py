"""The build backend of setuptools, with one change: editable installs have no entry point of torch.

torch loads the entry points of its group whenever it is imported, and fails where one cannot be
loaded. The metadata of an editable install stay in the environment when the clone is moved or
deleted, so every `import torch` of that environment would fail.
"""

import tempfile
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403 (the hooks that stay as they are)

GROUP = "[torch.backends]"


def prepare_metadata_for_build_editable(metadata_directory, config_settings=None):
    """Write the folder of metadata, without the group. Returns its name."""
    name = build_meta.prepare_metadata_for_build_editable(metadata_directory, config_settings)
    points = Path(metadata_directory, name, "entry_points.txt")
    points.write_text(without_group(points.read_text(encoding="utf-8")), encoding="utf-8")
    return name


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    """Build the wheel of an editable install with such metadata. Returns its name.

    The given folder of metadata is made again: front ends and setuptools differ on whether it is
    the folder of metadata itself or the folder that holds it.
    """
    with tempfile.TemporaryDirectory() as folder:
        prepare_metadata_for_build_editable(folder, config_settings)
        return build_meta.build_editable(wheel_directory, config_settings, folder)


def without_group(text: str) -> str:
    """The text of an `entry_points.txt` without the group of torch."""
    groups = text.split("\n\n")
    return "\n\n".join(group for group in groups if not group.lstrip().startswith(GROUP))
