"""What is measured between the steps of a run."""
