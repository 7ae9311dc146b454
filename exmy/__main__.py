"""`python -m exmy` is `exmy`."""

from exmy.cli import main

if __name__ == "__main__":
    main()
