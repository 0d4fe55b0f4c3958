"""What a converted model costs the host: kernels launched, rounds of messages, milliseconds."""
