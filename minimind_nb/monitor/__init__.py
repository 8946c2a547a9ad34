"""Metrics, charts, live views and summaries; workers import nothing but `metrics`."""
