"""Run one node as a process."""

import os
import sys

from robot_io.nodes import main

code = main(sys.argv[1:])
sys.stdout.flush()
sys.stderr.flush()
os._exit(code)  # DDS's own threads may outlive Python's clean-up
