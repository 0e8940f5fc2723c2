"""``python -m detkit.cli`` is ``detkit``."""

from detkit.cli import main

if __name__ == "__main__":
    main()
