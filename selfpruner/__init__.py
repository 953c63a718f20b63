"""The command: configuration, data, pipeline and report."""
