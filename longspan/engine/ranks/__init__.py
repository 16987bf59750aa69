"""The processes that compute every step together: how they meet, hear each other, and end."""
