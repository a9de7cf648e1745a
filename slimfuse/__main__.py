"""`python -m slimfuse`: what launchers of several processes start."""

from slimfuse.cli import main

if __name__ == "__main__":
    main()
