"""Linear algebra that methods share: the OBS sweep, least squares on a mask, the ADMM operator."""
