"""The program `srmu`, also as `python -m srmu`."""

import signal
import sys
from typing import Any


def end_early(*how: Any) -> None:
    """End without a traceback where a person interrupts before the program is loaded."""
    sys.exit(130)


def start_program() -> None:
    usual = signal.signal(signal.SIGINT, end_early)
    from srmu.cli.main import main

    signal.signal(signal.SIGINT, usual)
    main()


if __name__ == "__main__":
    start_program()
