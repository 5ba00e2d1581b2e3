"""A checkpoint as a row of blocks: the model without weights, and the weights, block by block.

source.py       where weights come from: a checkpoint on disk, or a loaded model
config.py       the configuration of a checkpoint
skeleton.py     the transformers model on the meta device, taken apart into blocks
stubs.py        stand-ins for the blocks, which record how the model calls them
linears.py      the prunable weight matrices of a block; experts.py: those of fused experts
stream.py       hidden states of all windows between two blocks; hidden_states.py stores them
loading.py      a whole model in memory, for evaluation; adapter.py: with an adapter of peft
checkpoint/     files: safetensors, GGUF, locks, atomic writes

Import from these files; this page exports nothing.
"""
