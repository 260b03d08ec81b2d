"""What people see of the project in Dagit, in a real browser."""
