"""The parts of scripts/soak.py: cells, processes, moments, watching, comparing, damage, report."""
