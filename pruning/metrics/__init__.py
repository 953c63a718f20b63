"""Metrics that say which units are unimportant."""
