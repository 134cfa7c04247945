"""Turn text sources into token sequences for the Hessians, with a manifest and a fingerprint."""

from qwenq.calibration.calibration_set import CalibrationManifest, CalibrationSet
from qwenq.calibration.load import DEFAULT_HELD_OUT, DEFAULT_SAMPLES, DEFAULT_SEQ_LEN, load_calibration

__all__ = [
    "DEFAULT_HELD_OUT",
    "DEFAULT_SAMPLES",
    "DEFAULT_SEQ_LEN",
    "CalibrationManifest",
    "CalibrationSet",
    "load_calibration",
]
