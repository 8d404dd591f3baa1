"""Text in, token windows out."""

from .calibration import CalibrationData as CalibrationData
from .calibration import load_calibration as load_calibration
