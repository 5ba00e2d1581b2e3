"""Checkpoints as files: safetensors, GGUF, cards, locks, atomic writes, untrusted reads."""
