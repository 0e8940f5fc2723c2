"""Gives numpy back the names that mxnet 1.9.1 and gluoncv 0.10.5 look for, which numpy 1.24 dropped."""

import numpy as np

_DROPPED = {"bool": bool, "complex": complex, "float": float, "int": int, "object": object, "str": str}

for _name, _type in _DROPPED.items():
    if _name not in np.__dict__:
        setattr(np, _name, _type)
