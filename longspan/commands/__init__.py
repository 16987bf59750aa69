"""What a person types: each file is the body of one command."""
