"""Messages between processes of one host, by how their threads are scheduled."""
