r"""Print the flags of the SGLang in this environment, one a line: `flags.txt` is its output.

Checked: run, with SGLang 0.5.23 of deploy/sglang-cpu.

    SGLANG_USE_CPU_ENGINE=1 PYTHONPATH=deploy/sglang-cpu/shims \
      .sglang-cpu/venv/bin/python deploy/sglang/list_flags.py > deploy/sglang/flags.txt
"""

import argparse
import os
from importlib.metadata import version

if os.environ.get("SGLANG_USE_CPU_ENGINE"):
    import sglang_cpu_server  # noqa: F401 - declares what a CPU build of torch lacks

from sglang.srt.server_args import ServerArgs


def main() -> None:
    """Print the version and every flag."""
    parser = argparse.ArgumentParser(add_help=False)
    ServerArgs.add_cli_args(parser)
    flags = {flag for action in parser._actions for flag in action.option_strings}  # noqa: SLF001 - no other way
    print(f"# Checked: run: written by list_flags.py with SGLang {version('sglang')}.")
    print("\n".join(sorted(flags)))


if __name__ == "__main__":
    main()
