"""GGUF: files for llama.cpp, Ollama and LM Studio."""
