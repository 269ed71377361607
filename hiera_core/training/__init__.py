"""Pre-training (MAE) and fine-tuning by recipe."""
