"""How good a model is: perplexity, tasks, speed; and how much models differ."""
