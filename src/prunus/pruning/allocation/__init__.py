"""How a sparsity is distributed over the layers of a model."""
