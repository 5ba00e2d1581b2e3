"""Checkpoints as files: safetensors, GGUF, locks, atomic writes and records beside results."""
