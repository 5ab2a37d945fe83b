def write_calibration(*a): pass
