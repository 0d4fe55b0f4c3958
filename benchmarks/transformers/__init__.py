"""Every diffusion transformer of diffusers, converted, against one device."""
