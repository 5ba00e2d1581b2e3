"""A checkpoint as a row of blocks: the model without weights, and the weights, block by block.

source.py       where weights are read: a checkpoint on disk, or a loaded model
config.py       the configuration of a checkpoint, checked against its weights
skeleton.py     the transformers model on the meta device, taken apart into blocks
calls.py        how the model calls its blocks, recorded by stubs in their place
linears.py      the prunable weight matrices of a block; experts.py: those of fused experts
stream.py       hidden states of all windows between two blocks
loading.py      a whole model in memory, for evaluation; adapter.py: with an adapter of peft
checkpoint/     files: safetensors, GGUF, locks, atomic writes

Import from these files; this page exports nothing.
"""
