"""The story of the product, told and proved on a small model: `make demo`."""
