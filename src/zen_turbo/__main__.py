"""``python -m zen_turbo`` is the command ``zen-turbo``."""

from zen_turbo.cli import main

if __name__ == "__main__":
    main()
