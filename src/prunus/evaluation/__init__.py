"""How good a model is: perplexity, tasks, images, speed; and how much models differ."""
