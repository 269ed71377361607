"""`python -m hiera_cli`, the same as `hiera`."""

from .app import main

if __name__ == "__main__":
    main()
