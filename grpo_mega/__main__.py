"""`python -m grpo_mega`, which is what torchrun starts as a rank, and what starts ranks itself when it stands alone."""

from grpo_mega.cli import main

if __name__ == "__main__":  # checkpoint writers spawn a process that imports this module again
    main()
