"""From a configuration to trained weights: one loop for every stage."""
