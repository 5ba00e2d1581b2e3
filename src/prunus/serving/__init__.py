"""One model behind an endpoint that speaks the OpenAI protocol, and packed linears for vLLM."""
