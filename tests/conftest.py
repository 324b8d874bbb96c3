"""Set before torch is imported: spinning OpenMP barriers make tests crawl on a machine with other work."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
