"""How the shipped models were trained, calibrated and judged."""
