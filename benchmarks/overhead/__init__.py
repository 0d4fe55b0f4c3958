"""What a sharded tensor costs an operation."""
