"""Weight files of other frameworks into networks of ``accel.models``.

A file goes through three steps, one module each: ``formats`` reads it into arrays under the file's
own names, ``naming`` says which of them belongs to which parameter, ``loading`` checks and converts
them and builds the network around them.
"""

from accel.weights.errors import WeightError
from accel.weights.formats import read
from accel.weights.loading import load

__all__ = ["WeightError", "load", "read"]
