"""Stands for a program of several processes: each does what DYING says for its number, such as "hang,7,save"."""

import os
import signal
import sys
import time
from pathlib import Path

number = int(os.environ.get("JAXLM_PROCESS", "0"))
does = os.environ["DYING"].split(",")[number]
if does == "hang":  # a collective that a dead peer never joins: a signal to save changes nothing
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(60)
elif does == "save":  # saves when it is told to; process 0 says when all can be told
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(42))
    ready = Path(os.environ["READY"])
    (ready / str(number)).touch()
    while len(list(ready.iterdir())) < int(os.environ["JAXLM_PROCESSES"]):
        time.sleep(0.02)
    print("ready", flush=True)
    time.sleep(60)
elif does == "late":  # saves with the others, and ends a moment after them
    time.sleep(1)
    sys.exit(42)
print(f"the last words of {number}, found at {os.environ.get('JAXLM_COORDINATOR')}", flush=True)
sys.exit(int(does))
