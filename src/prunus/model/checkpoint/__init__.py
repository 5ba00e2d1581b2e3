"""Checkpoints as files.

reader.py         safetensors, opened by their headers and read one tensor at a time
writer.py         safetensors, written atomically
atomic_files.py   files that are either whole or not there
regular_files.py  reading files of strangers: no devices, no pipes, no more than their kind may have
companions.py     the files next to the weights, which a result copies
output_folder.py  checks of the folder for a result
lock.py           one run at a time in a folder
gguf.py           import of a file of llama.cpp; gguf_header.py checks its header first

Import from these files; this page exports nothing.
"""
