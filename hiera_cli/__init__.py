"""The command line of the Hiera toolkit: parse, one call to hiera_core, print."""
