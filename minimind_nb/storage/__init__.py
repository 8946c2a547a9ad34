"""Folders that survive: verified folders, and the run folder made of them."""
