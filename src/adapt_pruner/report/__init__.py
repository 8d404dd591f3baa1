"""The account of a run: run.json, a model card, pictures."""

from .account import run_record as run_record
from .account import write_account as write_account
