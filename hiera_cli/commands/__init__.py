"""One file for each command of `hiera`."""
