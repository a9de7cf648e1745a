"""`python -m slimfuse_export`, for where scripts are not on the path."""

from slimfuse_export.cli import main

if __name__ == "__main__":
    main()
