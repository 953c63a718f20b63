"""What a compression will cost, from its configuration alone: no weight and no torch is loaded."""
