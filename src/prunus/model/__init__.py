"""A checkpoint as a row of blocks: the model without weights, and its weights block by block."""
