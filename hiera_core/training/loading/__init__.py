"""What happens to a batch between the workers that load it and the model."""
