"""One model behind an endpoint that speaks the OpenAI protocol.

transformers brings the server: its handlers read requests, write answers and stream tokens. This
room serves one model only, checks keys, puts requests into a queue, and stops the generation of a
request whose client is gone.

server.py           the application, its socket, and a clean end
gate.py             before every request: the key, the size, the queue, a client that leaves
job.py              one request while it is computed
request_options.py  what a request may ask for
handlers.py         transformers' handlers for chats and completions, with OpenAI's rules
generation.py       generation in threads that end when their client is gone
stop_text.py        stop sequences in a text that arrives in pieces
served_model.py     the only model that there is
errors.py           errors as OpenAI writes them

Another server, vLLM, gets the linears of packed checkpoints from here.

vllm_plugin.py      what vLLM calls: the quantization method, and how a layer is loaded
packed_layer.py     a layer whose weights are packed, where an engine joins several linears
"""
