"""Temporary files where the system has no place for them, as in a container with a read-only root."""

import os
import tempfile
from pathlib import Path

from streamsyn.errors import ConfigError


def temporary_files_near(output: Path) -> None:
    """Have this process make temporary files beside its output if the system has no folder for them.

    Libraries need them as well, and the processes started from here.

    Args:
        output: A file or folder that is written to; it need not exist yet.

    Raises:
        ConfigError: Nothing can be written there either.
    """
    try:
        tempfile.gettempdir()
    except FileNotFoundError as error:
        output = output.absolute()
        folder = next(one for one in (output, *output.parents) if one.is_dir())
        if not os.access(folder, os.W_OK):
            raise ConfigError(
                f"there is no place for temporary files, and {folder} cannot be written either; "
                "set TMPDIR to a directory that can be"
            ) from error
        tempfile.tempdir = os.environ["TMPDIR"] = str(folder)
