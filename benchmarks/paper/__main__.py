"""The paper's tables and figures with their baselines, at a size that fits the machine: `python -m benchmarks.paper --scale demo`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .dry_run import DryRunSettings, dry_run, dry_run_table
from .run import reproduce
from .scales import SCALES


def parser() -> argparse.ArgumentParser:
    """The options."""
    found = argparse.ArgumentParser(
        prog="python -m benchmarks.paper", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    found.add_argument("--scale", choices=list(SCALES), default="demo", help="bundled models; SmolLM2-135M; Llama-3-8B and Florence-2")
    found.add_argument(
        "--work", default="peft-icm-reproduce", help="folder of the data, and of what is made and kept: LoRAs, models, scores"
    )
    found.add_argument("-o", "--output", default="benchmarks/paper/results", help="folder of the results")
    parts = "table1 ... table6, figure2, figure4, figure5, ablations, memorisation"
    found.add_argument("--only", nargs="+", metavar="PART", default=None, help=parts)
    found.add_argument("--ranks", type=int, nargs="+", default=None, help="ranks of Tables 3 and 4; by default those of the scale")
    found.add_argument("--dry-run", action="store_true", help="paper: shapes, bytes, steps, time and memory on the meta device")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Make the results, or print what the paper's size would take.

    Args:
        argv (`Sequence[str]`, *optional*): By default `sys.argv[1:]`.

    Returns:
        `int`: Exit code: 0, or 2 for bad input (one line on stderr).
    """
    args = parser().parse_args(argv)
    try:
        if args.dry_run and args.scale != "paper":
            raise ValueError(f"--dry-run is for --scale paper; --scale {args.scale} runs on this machine: leave --dry-run out.")
        if args.dry_run:
            print(dry_run_table(dry_run(DryRunSettings())))
        else:
            reproduce(args.scale, args.work, args.output, only=args.only, ranks=args.ranks)
    except (ValueError, OSError) as error:
        print(f"benchmarks.paper: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
