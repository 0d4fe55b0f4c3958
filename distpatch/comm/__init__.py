"""Everything that talks to other ranks: process groups, transports, row exchange, collectives."""
