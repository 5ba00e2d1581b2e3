"""Linear algebra that methods share: the OBS sweep, and the best weights for a mask."""
