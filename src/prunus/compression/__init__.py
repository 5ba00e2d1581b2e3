"""Checkpoints in fewer bytes: the verbs compress, pack and unpack."""
