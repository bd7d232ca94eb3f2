"""``python -m noflush plan | simulate | compare | trace | doctor``."""

from __future__ import annotations

import argparse
import sys

try:
    from noflush.commands import compare, doctor, plan, simulate, trace
except ModuleNotFoundError as error:
    if error.name != "rich":
        raise
    sys.exit('python -m noflush needs the package rich: pip install "noflush[cli]"')


def main(argv: list[str] | None = None) -> int:
    """Runs one subcommand; a fault of the user's is one line on stderr and exit status 2."""
    parser = argparse.ArgumentParser(prog="noflush", description="Pipeline training without the flush.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (plan, simulate, compare, trace, doctor):
        module.add(commands)
    args = parser.parse_args(argv)
    try:
        return int(args.run(args))
    except ValueError as error:
        print(f"noflush {args.command}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
