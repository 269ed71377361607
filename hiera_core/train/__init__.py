"""Training: one engine; the recipe supplies model, data, augmentation, optimiser and schedule."""
