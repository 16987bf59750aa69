"""`python -m longspan`: the command, where it is not on the path."""

from longspan.cli import main

if __name__ == "__main__":
    main()
