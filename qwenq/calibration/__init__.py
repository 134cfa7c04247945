"""Turn text sources into token sequences for the Hessians, with a manifest and a fingerprint."""

from qwenq.calibration.calibration_set import CalibrationManifest, CalibrationSet
from qwenq.calibration.load import load_calibration

__all__ = ["CalibrationManifest", "CalibrationSet", "load_calibration"]
