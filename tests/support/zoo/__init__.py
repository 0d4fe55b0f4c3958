"""Models: layers, nets, U-Nets, transformers, autoencoders, pipelines."""
