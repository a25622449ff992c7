import sys

from longtail_experts.cli import main

sys.exit(main(sys.argv[1:]))
