"""Checkpoints as files.

reader.py         safetensors, opened by their headers and read one tensor at a time
writer.py         safetensors, written atomically
atomic_files.py   files that are either whole or not there, and their digests
regular_files.py  reading untrusted files: no devices, no pipes, no more than their kind may have
output_folder.py  checks of the folder for a result, and the files that it copies
lock.py           one run at a time in a folder
gguf.py           import of a file of llama.cpp

Import from these files; this page exports nothing.
"""
