import sys

from dpojax.cli import main

sys.exit(main())
