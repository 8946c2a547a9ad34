"""Processes that work together: starting, watching, agreeing and judging them.

Knows nothing of models.
"""
