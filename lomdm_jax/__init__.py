"""Masked text diffusion in JAX with the generation order under control."""
