"""Judge an encoder by what simple classifiers can read from its frozen features."""
