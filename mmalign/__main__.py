"""`python -m mmalign`, which is what `accelerate launch -m mmalign` runs."""

from mmalign.cli import main

if __name__ == "__main__":
    main()
