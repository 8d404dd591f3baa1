"""Compare methods and settings on one model: the papers' tables by one command."""

from .grid import Comparison as Comparison
from .grid import ComparisonListener as ComparisonListener
from .grid import ComparisonRequest as ComparisonRequest
from .grid import compare as compare
from .variants import VARIANTS as VARIANTS
