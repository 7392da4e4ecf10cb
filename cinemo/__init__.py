"""Cinemo (arXiv 2407.15642) as a system: clips -> latent shards -> training -> bundle -> animated images over HTTP."""

import os

# Threads that wait for each other sleep instead of spinning, unless the user says otherwise. Where cores are shared,
# spinning made sampling with a small network 5 to 40 times slower; it must be set before torch loads its OpenMP.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = "0.1.0"
