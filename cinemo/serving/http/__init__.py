"""The HTTP interface over the job store."""
