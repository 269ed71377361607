"""Files in, model input out: sources, readers, sampling, transforms and data sets."""
