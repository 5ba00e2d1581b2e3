"""The training loop that recover and compress share. It knows steps and losses, and no model."""
