"""The MiniMind network, text generation with it, and its file formats."""
