"""llmtrain: from raw text to an evaluated language model, every part a config group."""

__version__ = "0.1.0"
