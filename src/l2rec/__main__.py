"""The command from its first moment on: Ctrl-C while its modules load is an interruption too."""

from __future__ import annotations

__all__ = ["main"]

import signal
import sys


def main() -> None:
    """Load the command line and run it."""
    try:
        from l2rec.cli import main as run
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as `l2rec.cli` does
        sys.stderr.write("l2rec: interrupted\n")
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
