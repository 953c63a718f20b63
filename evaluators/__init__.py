"""The judges: perplexity, tasks, latency, memory, significance."""
