"""One file for each task or family of tasks; `registry` knows their names."""
