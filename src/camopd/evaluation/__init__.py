"""What `evaluate` is made of: the harness, the intervals, the report."""
