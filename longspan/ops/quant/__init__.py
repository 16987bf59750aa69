"""Products with quantised weights: one file a backend. `longspan.ops` chooses among them."""
