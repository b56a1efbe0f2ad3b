from . import sdar as sdar
