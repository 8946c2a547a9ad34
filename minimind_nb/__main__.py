"""`python -m minimind_nb …` does what `minimind-nb …` does."""

from .cli import main

if __name__ == "__main__":
    main()
