"""Files that several rooms write and read. No torch."""
