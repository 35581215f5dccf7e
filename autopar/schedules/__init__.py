"""Pipeline schedules: who computes what in which order, what is sent for it, and the proof that it runs. See README.md."""
