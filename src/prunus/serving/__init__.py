"""The server of transformers for one model, and packed linears for vLLM."""
