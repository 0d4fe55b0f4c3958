"""distpatch beside every system that can do part of its job."""
