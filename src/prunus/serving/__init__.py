"""One model behind an endpoint that speaks the OpenAI protocol.

It checks keys, puts requests into a queue, reads them in a process of their own, and stops the
generation of a request whose client is gone.

server.py      the routes, their socket, and a clean end
gate.py        before every request: the key, the size, the queue, a client that leaves; the log
reader.py      the process that turns requests into token ids, within limits
requests.py    what a request may ask for
generation.py  generation in threads that end when their client is gone; log-probabilities
answers.py     answers as OpenAI writes them
errors.py      errors as OpenAI writes them

Another server, vLLM, gets the linears of packed checkpoints from here.

vllm_plugin.py      what vLLM calls: the quantization method, and how a layer is loaded
packed_layer.py     a layer whose weights are packed, where an engine joins several linears
"""
