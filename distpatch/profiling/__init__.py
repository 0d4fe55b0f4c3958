"""What a run did: records of what was sent and gathered, operations and FLOPs, bytes alive."""
