from __future__ import annotations

import os

# Tensors here are small: a second thread waits more than it computes, above all where the machine is shared. Read by
# torch when it is imported, here and in the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
