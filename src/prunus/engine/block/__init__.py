"""The block loop's body and the walks through a block."""
