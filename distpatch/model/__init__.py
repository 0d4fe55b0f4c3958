"""A model converted and restored: what enters and leaves its calls, and the single-device Patch Conv layers."""
