"""Commands of `hiera`, one module for each."""
