"""``python -m protoframe.cli`` is ``pf``."""

import sys

try:
    from protoframe.cli.main import main
except KeyboardInterrupt:
    sys.exit(130)

if __name__ == "__main__":
    main()
