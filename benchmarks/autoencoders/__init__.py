"""Every autoencoder of diffusers, converted, against one device."""
