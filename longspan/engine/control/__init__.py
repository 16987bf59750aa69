"""What to compute next: requests, blocks, prefixes, plans, costs, the loop. No torch."""
