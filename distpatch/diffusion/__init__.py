"""Denoising loops: displaced steps, guidance on halves of the ranks, pipelines of diffusers."""
