"""The program `srmu`, also as `python -m srmu`."""

import signal
import sys
from typing import Any


def end_early(*how: Any) -> None:
    """End without a traceback where a person interrupts before the program is loaded."""
    sys.exit(130)


def main() -> None:
    usual = signal.signal(signal.SIGINT, end_early)
    from srmu.cli.main import main as run_program

    signal.signal(signal.SIGINT, usual)
    run_program()


if __name__ == "__main__":
    main()
