"""From `run --train CONFIG` to what keeps the training up. What can be wrong with it is found here, as far
as that takes neither torch nor the model.
"""

import sys
from pathlib import Path

from streamsyn.errors import ConfigError
from streamsyn.tandem.companion import Companion
from streamsyn.trainer.request import check, check_launcher, resolve

FOLDER = "training"
"""Where in the run directory the training keeps its files, if nothing else is said."""


def training_beside(path: Path, run_out: Path, *, as_json: bool) -> Companion:
    """The training that follows a run into `run_out`, as the file says.

    Raises:
        ConfigError: The file or what it names cannot be used.
    """
    try:
        request = resolve(path, str(run_out), None, None, default_out=run_out / FOLDER)
        check(request)
        check_launcher(request.config.train)
    except ConfigError as error:
        raise ConfigError(f"--train {path}: {str(error).removeprefix(f'{path}: ')}") from error
    launcher = request.config.train.launcher or (sys.executable,)
    given = ["train", str(path), "--from", str(run_out), "--out", str(request.out), "--tethered"]
    command = [*launcher, "-m", "streamsyn", *given, *(["--log-json"] if as_json else [])]
    return Companion(command, request.out, as_json=as_json)
