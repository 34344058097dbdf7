"""Before torch loads: how its threads wait for one another on a CPU."""

import os
from contextlib import suppress
from pathlib import Path

# OpenMP's threads spin while they wait, by default for milliseconds. Where something else runs as well, that
# takes the time of the very thread that they wait for. A thirtieth of the rounds costs an idle machine
# nothing. Where other programs fill all cores, threads had better sleep at once (idle cores: half the speed).
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ):
    running = 0
    with suppress(OSError, ValueError, IndexError):  # Linux alone tells
        running = int(Path("/proc/loadavg").read_text().split()[3].split("/")[0])  # this process among them
    if running > (os.cpu_count() or 1):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    else:
        os.environ["GOMP_SPINCOUNT"] = "10000"
