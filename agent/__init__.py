"""The search: an LLM or classical operators propose plans, a graph scores them."""
