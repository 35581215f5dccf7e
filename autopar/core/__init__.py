"""The values autopar reasons about: torch-free, frozen, printable."""
