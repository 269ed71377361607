"""Command line of the Hiera toolkit. A command parses its options, calls hiera_core and prints."""
