"""What operators, collectives and training state cost: seconds and bytes, from a cluster's numbers. See README.md."""
