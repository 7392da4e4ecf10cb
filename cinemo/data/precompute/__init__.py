"""The job that makes a dataset: its plan, its Ray Data graph, what survives a kill, and what it says on the way."""
