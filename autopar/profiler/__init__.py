"""Measuring a machine and fitting the numbers of a cluster file to it."""
