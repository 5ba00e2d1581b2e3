"""Block reconstruction: train the surviving weights of one block towards the dense block."""
