"""Transports as late, as slow or as strict as a real one may be."""
