"""The step "train": a short training wins back quality of a smaller model."""
