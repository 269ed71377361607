"""Training by recipe: pre-training (MAE) and fine-tuning."""
