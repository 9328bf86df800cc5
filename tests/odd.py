"""Values that people give to settings by mistake, or by a program's."""

import math

ODD = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf, "zero": 0, "minus": -1, "half": 1.5, "empty": "",
       "null": None, "huge": 10**400, "huge float": 1e300, "text": "abc", "list": [1], "mapping": {"a": 1},
       "true": True, "false": False}  # fmt: skip
