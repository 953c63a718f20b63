"""Drivers: what turns prompts into replies."""
