"""Routed experts: one file a backend. See `longspan.ops` for what chooses among them."""
