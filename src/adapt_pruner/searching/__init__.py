"""Search for the settings of a method that leave the best model: AdaPruner's samples and importance
by default, and any other setting that is given a range."""

from .request import SearchListener as SearchListener
from .request import SearchRequest as SearchRequest
from .request import SearchSettings as SearchSettings
from .study import run_search as run_search
from .study import search as search
