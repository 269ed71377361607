"""The error of a peer that cannot be measured with a model."""


class NotOffered(Exception):
    """A peer has no such model, or does not run it in this way. The message names both."""
