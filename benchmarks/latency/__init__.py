"""Stable Diffusion's decoder with messages that take longer."""
