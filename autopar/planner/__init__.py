"""The planner: graph and cluster in, plan out. `plan.py` is the table of contents."""
