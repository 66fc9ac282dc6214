"""Peak memory of `streamsyn run` with 10,000 and with 200,000 seeds, on a simulator without latency.

python -m benchmarks.memory [--seeds 10000 200000] [--contexts-per-sample 10] [--words 60]
"""

import argparse
import tempfile
from pathlib import Path

from benchmarks.common import Simulator, run_measured, seeds_file


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[10_000, 200_000], help="seeds of each run")
    parser.add_argument("--contexts-per-sample", type=int, default=10)
    parser.add_argument("--words", type=int, default=60, help="words a context")
    args = parser.parse_args()
    print(f"n = {args.contexts_per_sample}, {args.words} words a context")
    print(f"{'seeds':>10}{'seconds':>10}{'outcomes/s':>12}{'peak RSS MiB':>14}{'vs. first run':>15}")
    first = 0.0
    for number in args.seeds:
        simulator = Simulator("--latency-ms", "0", "--words", str(args.words), "--slots", "4096")
        with tempfile.TemporaryDirectory() as folder, simulator as url:
            options = [
                "--seeds",
                str(seeds_file(Path(folder), number)),
                "--server",
                url,
                "--out",
                f"{folder}/out",
            ]
            options += ["--set", f"assembly.contexts_per_sample={args.contexts_per_sample}", "--no-progress"]
            options += ["--set", "sink.compression=zstd"]
            cost = run_measured("run", *options)
        first = first or cost.peak_mib
        rate = number / cost.wall_s
        print(
            f"{number:10,}{cost.wall_s:10.1f}{rate:12.0f}{cost.peak_mib:14.1f}{cost.peak_mib / first:15.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
