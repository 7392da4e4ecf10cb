"""Serving: a durable job store, the HTTP interface, the runner that works jobs off, and their Ray Serve deployment."""
