"""Plug-ins of serving systems: autoencoders on all ranks of a server, where DISTPATCH_SERVING=1 asks for it."""
