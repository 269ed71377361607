"""The classes of a data set."""
