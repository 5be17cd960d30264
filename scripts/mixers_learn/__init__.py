"""The parts of scripts/mixers_learn.py: arms, tasks, training, jobs, books, report."""
