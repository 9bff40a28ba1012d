"""This night against an earlier run: what became better or worse, which stage is to blame, and the trend."""
