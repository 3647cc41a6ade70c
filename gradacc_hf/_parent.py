"""Who started this process: to be imported first of all, before what takes seconds."""

import os

PARENT = os.getppid()
