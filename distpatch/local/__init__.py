"""Ranks on this host for a program of one process, without torchrun."""
