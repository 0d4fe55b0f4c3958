"""Stable Diffusion's decoder: one process against ranks."""
