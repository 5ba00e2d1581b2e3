"""Formats of compressed models: how the values of a model become bytes, and back.

A format is one class, derived from `Codec`, and one entry of the table. The command line, `plan`,
completion, errors and whoever opens a model read this table. The page "Add a format" follows one
step by step. What types are chosen, and how weights are rounded to them, is `rounding/`.

    table.py               the formats by name, suffix and key
    codec.py               what a format is: it plans, encodes, decodes, opens
    fixed.py               what llama.cpp and mlx-lm compute and no configuration changes
    block_bytes.py         the bytes of rounded columns, as fields of bits
    gguf/                  files for llama.cpp, Ollama and LM Studio
    compressed_tensors.py  integers for vLLM and SGLang
    mlx.py                 integers for mlx-lm and LM Studio
"""
