"""`python -m srmu` is the same program as `srmu`."""

from srmu.cli.main import main

if __name__ == "__main__":
    main()
