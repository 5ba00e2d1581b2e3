"""Checkpoints in fewer bytes: the command compress."""
