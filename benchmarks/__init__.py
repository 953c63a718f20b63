"""Measurements of this project against alternatives, each in one run."""
