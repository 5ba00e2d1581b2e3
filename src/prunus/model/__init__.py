"""A checkpoint as a row of blocks: lazy safetensors, skeleton, linears, families; import from elsewhere."""
