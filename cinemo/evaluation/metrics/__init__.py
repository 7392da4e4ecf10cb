"""What is measured on videos, and the sums it is made of."""
