"""Cinemo (arXiv 2407.15642) as a system: clips -> latent shards -> training -> bundle -> animated images over HTTP."""

__version__ = "0.1.0"
