"""The surgeon: statistics, ranking, correction, elastic model, slicing, export."""
