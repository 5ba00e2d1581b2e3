"""Checkpoints as files: safetensors, cards, locks, atomic writes, untrusted reads."""
