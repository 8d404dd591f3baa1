"""Compare methods and settings on one model: the papers' tables by one command."""

from .cells import Comparison as Comparison
from .cells import ComparisonListener as ComparisonListener
from .cells import ComparisonRequest as ComparisonRequest
from .grid import compare as compare
from .variants import VARIANTS as VARIANTS
