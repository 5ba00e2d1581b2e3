"""Formats of compressed models: how the values of a model become bytes, and how many.

A format is one class, derived from `Codec` (`codec.py`), and one entry of `FORMATS`
(`table.py`). The command line, `plan`, completion, errors and whoever opens a
model read this table. The page "Add a format" follows one step by step.

    codec.py               what a format is: it plans, encodes, decodes, opens
    size_plan.py           which weights have types, and how large the result becomes
    type_choice.py         the type of each weight, by its loss, bytes and time
    compression_recipe.py  the options of compress
    compression_record.py  its record
    cards.py               model cards
    block_bytes.py         the bytes of quantised columns, as fields of bits
    gguf/                  files for llama.cpp, Ollama and LM Studio
    compressed_tensors.py  integers for vLLM and SGLang
    mlx.py                 integers for mlx-lm and LM Studio
"""
