"""The server of transformers for one model."""
