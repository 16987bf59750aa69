"""A server's processes: messages, sockets, how they start and end. No torch."""
