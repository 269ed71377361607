"""Entry point of `python -m hiera_cli`, which is the same as the command `hiera`."""

from .app import main

if __name__ == "__main__":
    main()
