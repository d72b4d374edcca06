"""Aque: graphs of commands and functions on your machines."""
