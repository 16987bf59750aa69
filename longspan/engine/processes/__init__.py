"""A server's processes: their messages, their sockets, their start and end. No torch."""
