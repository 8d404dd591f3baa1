"""Targets in time: what the parts of a model take of it, measured once, and what is left of it when
widths shrink. `table` holds the times, `cost` counts with them, `measuring` makes them."""

from .cost import Latency as Latency
from .measuring import Measured as Measured
from .measuring import measured_speedup as measured_speedup
from .measuring import table_for as table_for
from .multiples import choose_multiple as choose_multiple
from .table import LatencyTable as LatencyTable
from .table import read_table as read_table
from .table import write_table as write_table
