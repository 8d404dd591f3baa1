"""The account of a run: run.json, a model card, pictures, a page for the browser."""

from .account import run_record as run_record
from .account import write_account as write_account
from .account import write_page as write_page
