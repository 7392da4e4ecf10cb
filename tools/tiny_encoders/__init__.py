"""Training of the tiny encoders that ship with the package: frames, the VAE and the text model."""
