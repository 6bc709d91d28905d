from __future__ import annotations

import sys
from pathlib import Path

# Test modules are imported by path, so that equal names in other distributions do not clash; helpers are not.
sys.path.insert(0, str(Path(__file__).parent))
