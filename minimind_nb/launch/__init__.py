"""Start, watch and end processes that train together. Knows nothing of models."""
