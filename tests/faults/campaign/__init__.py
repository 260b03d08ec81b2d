"""What is met in databases, and what comes of it: `python -m tests.faults.campaign`."""
