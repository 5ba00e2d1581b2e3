"""Checkpoints in fewer bytes: the commands compress, pack and unpack."""
