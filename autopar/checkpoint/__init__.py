"""Checkpoints that outlive a crash and do not depend on the plan, and weights in Hugging Face's own format."""
