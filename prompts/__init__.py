"""The words: one folder of prompt files per strategy."""
