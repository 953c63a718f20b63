"""Corrections that let the surviving units make up for the removed ones."""
